"""`make zoo`: convert and prove each network in a process of its own, and print the table, failures first.

python -m tests.zoo                     all
python -m tests.zoo timm:repvgg_a0 ...  these
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900
COLUMNS = ("network", "marked", "sites", "normalisations", "convolutions", "proof error", "plan s", "in all s")
MARKS = {"autocast", "changes-with-size", "decides-by-size", "decides-by-value", "unseen-operation", "writes-state"}


@dataclass(frozen=True)
class Row:
    """What came of one network. ``marked`` counts refusals of what holds
    at the recorded sizes and values only, or cannot be seen; the rest is before and after."""

    name: str
    marked: int = 0
    sites: int = 0
    norms: tuple[int, int] = (0, 0)
    convolutions: tuple[int, int] = (0, 0)
    error: float | None = None
    plan_seconds: float = 0.0
    seconds: float = 0.0
    failure: str = ""


def convert(name: str) -> Row:
    """Convert one network, in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import torchvision_schemas

    torchvision_schemas.install()
    from support.agreement import operations

    from repfuse.planning.planner import plan
    from repfuse.proof import prove
    from repfuse.rewriting import rewrite
    from repfuse.verifying import input_variants
    from repfuse.verifying.comparison import reference
    from tests.zoo.networks import build

    network, example = build(name)
    before = operations(network, *example)
    started = time.perf_counter()
    found = plan(network, example)
    planned = time.perf_counter() - started
    fused, proof = network, None
    if found.sites:
        fused, trials = rewrite(network, found), input_variants(example)
        proof = prove(network, found, fused, trials, reference(network, trials))
    after = operations(fused, *example)
    return Row(
        name,
        sum(refusal.code in MARKS for refusal in found.refusals),
        len(found.sites),
        (before["batch_norm"], after["batch_norm"]),
        (before["convolution"], after["convolution"]),
        proof.error if proof else None,
        planned,
        time.perf_counter() - started,
        "" if proof is None or proof.passed else f"not proven: {proof.reason}",
    )


def in_a_process(name: str) -> Row:
    """Convert one network in a process of its own, which may fail, hang or take all memory."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.zoo", "--one", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, failure=f"took more than {SECONDS} s")
    if done.returncode:
        return Row(name, failure=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[Row]) -> Table:
    """Return the table, failures first."""
    made = Table(*COLUMNS)
    for row in sorted(rows, key=lambda row: not row.failure):
        if row.failure:
            made.add_row(row.name, row.failure, style="red")
            continue
        arrow = (f"{before} -> {after}" for before, after in (row.norms, row.convolutions))
        error = "" if row.error is None else f"{row.error:.1e}"
        made.add_row(
            row.name, str(row.marked), str(row.sites), *arrow, error, f"{row.plan_seconds:.1f}", f"{row.seconds:.1f}"
        )
    return made


def main() -> int:
    """Run what the command line asks for."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(asdict(convert(sys.argv[2]))))
        return 0
    from support import torchvision_schemas

    torchvision_schemas.install()
    from tests.zoo.networks import names

    chosen = sys.argv[1:] or names()
    progress = Console(stderr=True)
    rows = []
    for name in track(chosen, "converting", console=progress):
        rows.append(in_a_process(name))
        if rows[-1].failure:
            progress.print(f"{name}: {rows[-1].failure}")
    console = Console(width=160)
    console.print(table(rows))
    failed = sum(bool(row.failure) for row in rows)
    console.print(f"{len(rows) - failed} of {len(rows)} converted and proven")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main())
