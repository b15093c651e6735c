"""Measures the README's table with the command line itself, and writes it there: `make bench`.

Each network is timm's, with random weights, saved as safetensors; then `repfuse convert` and `repfuse bench` do what
they do for a user. It takes some minutes and wants a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from support import torchvision_schemas
from support.networks import timm_network

from repfuse.report import tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- results: written by `make bench`; do not edit by hand -->", "<!-- end of results -->"
NETWORKS = ("repvgg_a0", "repvgg_b1g4", "mobileone_s0")
HEAD = (
    "| network | operators merged | parameters | proof: error in float64 | drift in float32 (the original's own) | "
    "time to convert | latency, batch 1 | speed-up (95 % interval) |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    torchvision_schemas.install()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            print(name, file=sys.stderr)
            rows.append(measure(name, Path(folder)))
    begin, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    end = rest.partition(END)[2]
    table = "\n".join([*HEAD, *(row for row, _ in rows)])
    README.write_text(f"{begin}{BEGIN}\n{table}\n\n{rows[0][1]}\n{END}{end}", encoding="utf-8")


def measure(name: str, folder: Path) -> tuple[str, str]:
    """Return the network's row of the table, and what to say below it."""
    source, fused = folder / f"{name}.safetensors", folder / f"{name}.fused.safetensors"
    state = timm_network(name).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, source)
    model = ("--model", f"timm:{name}")
    report = repfuse("convert", source, fused, *model)
    timing = repfuse("bench", source, fused, *model, "--rounds", "60", "--seconds", "60")
    return row(name, report, timing), caption(report, timing)


def repfuse(*args: object) -> dict[str, Any]:
    """Run a command and return its JSON."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support")}
    command = [sys.executable, "-m", "repfuse", *map(str, args), "--json"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


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
        f"{measured['speedup']:.2f}x ({measured['low']:.2f} to {measured['high']:.2f})",
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
