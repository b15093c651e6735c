"""Measures the README's tables with the command line itself, and writes them there: `make bench`.

Each network is timm's, with random weights, saved as safetensors; then `repfuse convert` and `repfuse bench` do what
they do for a user. In the runtimes, timm's own re-parameterised form is timed against the fused one, too. It takes some
minutes and wants a machine that does nothing else.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import torchvision_schemas
from support.networks import timm_network

from repfuse.report import tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- results: written by `make bench`; do not edit by hand -->", "<!-- end of results -->"
NETWORKS = ("repvgg_a0", "repvgg_b1g4", "mobileone_s0")
DEPLOYED = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m1")
REPORTED = "mobileone_s0"
"""Whose report is shown, with where each site gains, beside the sample checkpoints."""
RUNTIMES = "eager,compile,onnxruntime,openvino"
HEAD = (
    "| network | operators merged | parameters | proof: error in float64 | drift in float32 (the original's own) | "
    "time to convert | latency, batch 1 | speed-up (95 % interval) |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


RUNTIME_HEAD = (
    "| network | runtime | original | fused | speed-up | over the original in eager | of a matrix product | "
    "timm's form over fused |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    torchvision_schemas.install()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            print(name, file=sys.stderr)
            rows.append(measure(name, Path(folder)))
        deployed = [line for name in DEPLOYED for line in in_runtimes(name, Path(folder))]
    begin, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    end = rest.partition(END)[2]
    README.write_text(f"{begin}{BEGIN}\n{results(rows, deployed)}\n{END}{end}", encoding="utf-8")


def results(rows: Sequence[tuple[str, str]], deployed: Sequence[str]) -> str:
    """Return both tables: ``rows`` are those of the first, with what is said below it."""
    table = "\n".join([*HEAD, *(row for row, _ in rows)])
    runtimes = "\n".join([*RUNTIME_HEAD, *deployed])
    said = "Batch 1, one thread, 95 % intervals; the last column is how many times as long timm's own form takes."
    return f"{table}\n\n{rows[0][1]}\n\n{runtimes}\n\n{said}"


def measure(name: str, folder: Path) -> tuple[str, str]:
    """Return the network's row of the table, and what to say below it."""
    source, fused = folder / f"{name}.safetensors", folder / f"{name}.fused.safetensors"
    state = timm_network(name).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, source)
    model = ("--model", f"timm:{name}")
    report = repfuse("convert", source, fused, *model)
    timing = repfuse("bench", source, fused, *model, "--rounds", "60", "--seconds", "60")
    return row(name, report, timing), caption(report, timing)


def in_runtimes(name: str, folder: Path) -> list[str]:
    """Return a row for each runtime: the network, what repfuse makes of it, and what timm makes of it."""
    from timm.utils.model import reparameterize_model

    print(f"{name} in {RUNTIMES}", file=sys.stderr)
    source, fused, theirs = (folder / f"{name}.{kind}.pt" for kind in ("whole", "fused", "timm"))
    model = timm_network(name)
    torch.save(model, source)
    torch.save(reparameterize_model(copy.deepcopy(model)), theirs)
    repfuse("convert", source, fused, "--allow", "timm", "--quick")
    options = ("--trust", "--runtime", RUNTIMES, "--threads", "1", "--rounds", "40", "--seconds", "30")
    sites = ("--sites",) if name == REPORTED else ()
    ours, peer = repfuse("bench", source, fused, *options, *sites), repfuse("bench", theirs, fused, *options)
    if name == REPORTED:
        show(name, fused, ours)
    beside = {entry["runtime"]: entry for entry in peer["measurements"]}
    return [runtime_row(name, entry, beside.get(entry["runtime"])) for entry in ours["measurements"]]


def show(name: str, fused: Path, timing: dict[str, Any]) -> None:
    """Write the report of a conversion with its benchmark, as a page and as a comment."""
    benchmark, shown = fused.with_suffix(".json"), ROOT / "sample_checkpoints" / f"{name}.report"
    benchmark.write_text(json.dumps(timing), encoding="utf-8")
    documents = f"{fused}.report.json", benchmark
    run("report", *documents, "--html", f"{shown}.html", "--markdown", f"{shown}.md", "--force")


def runtime_row(name: str, entry: dict[str, Any], beside: dict[str, Any] | None) -> str:
    over, fused = entry["over_eager"], entry["fused"]
    cells = (
        name,
        entry["runtime"],
        *(tables.duration(entry[side]["median"]) for side in ("original", "fused")),
        interval(entry["speedup"], entry["low"], entry["high"]),
        "" if over is None else interval(over["value"], over["low"], over["high"]),
        "" if fused["floor"] is None else tables.percent(fused["floor"] / fused["median"]),
        "" if beside is None else interval(beside["speedup"], beside["low"], beside["high"]),
    )
    return f"| {' | '.join(cells)} |"


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f}x ({low:.2f} to {high:.2f})"


def repfuse(*args: object) -> dict[str, Any]:
    """Run a command and return its JSON."""
    return json.loads(run(*args, "--json"))


def run(*args: object) -> bytes:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support")}
    command = [sys.executable, "-m", "repfuse", *map(str, args)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout


def row(name: str, report: dict[str, Any], timing: dict[str, Any]) -> str:
    sites, drift, measured = report["plan"]["sites"], report["drift"]["worst"], timing["measurements"][0]
    operators = (str(sum(site[side]["launches"] for site in sites)) for side in ("before", "after"))
    parameters = (tables.count(timing[side]["parameters"]) for side in ("before", "after"))
    latency = (tables.duration(measured[side]["median"]) for side in ("original", "fused"))
    cells = (
        name,
        tables.change(*operators),
        tables.change(*parameters),
        tables.error(report["proof"]["error"]),
        f"{tables.error(drift['fused']['rms'])} ({tables.error(drift['own']['rms'])})",
        tables.duration(report["seconds"]),
        tables.change(*latency),
        interval(measured["speedup"], measured["low"], measured["high"]),
    )
    return f"| {' | '.join(cells)} |"


def caption(report: dict[str, Any], timing: dict[str, Any]) -> str:
    shape = tables.shape(timing["shapes"][0])
    threads = tables.plural(timing["measurements"][0]["threads"], "thread")
    return (
        f"timm's networks with random weights, input {shape}, {threads} of {processor()}, "
        f"torch {report['environment']['torch']}."
    )


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
