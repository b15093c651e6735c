"""`make zoo`: convert and prove each network in a process of its own, and print the table, failures first.

python -m tests.zoo                     all
python -m tests.zoo timm:repvgg_a0 ...  these
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900
COLUMNS = (
    "network",
    "sites",
    "normalisations",
    "convolutions",
    "proof error",
    "plan s",
    "allowed s",
    "in all s",
    "why",
)
FORWARDS, PER_NODE = 12, 1e-3
"""How long a plan may take, in seconds of the processor: so many forward passes, and so many for each operation."""


@dataclass(frozen=True)
class Row:
    """What came of one network. ``norms`` and ``convolutions`` are before and after; where some of the former stay,
    ``refusals`` say why: how many places have each code."""

    name: str
    sites: int = 0
    norms: tuple[int, int] = (0, 0)
    convolutions: tuple[int, int] = (0, 0)
    error: float | None = None
    plan_seconds: float = 0.0
    allowed_seconds: float = 0.0
    seconds: float = 0.0
    refusals: dict[str, int] = field(default_factory=dict)
    failure: str = ""


def convert(name: str) -> Row:
    """Convert one network, in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from support import torchvision_schemas

    torchvision_schemas.install()
    from support.agreement import operations
    from support.norms import unexplained

    from repfuse.checking.comparison import reference
    from repfuse.checking.inputs import input_variants
    from repfuse.checking.proof import prove
    from repfuse.planning.planner import plan
    from repfuse.rewriting import rewrite
    from tests.zoo.networks import build

    network, example = build(name)
    before = operations(network, *example)
    begun = time.perf_counter()
    with torch.no_grad():
        started = time.process_time()
        network(*example)
        forward = time.process_time() - started
    started = time.process_time()
    found = plan(network, example)
    planned = time.process_time() - started
    fused, proof = network, None
    if found.sites:
        fused, trials = rewrite(network, found), input_variants(example)
        proof = prove(network, found, fused, trials, reference(network, trials))
    after, silent = operations(fused, *example), unexplained(found)
    failure = f"stay without a refusal: {', '.join(silent)}" if silent else ""
    return Row(
        name,
        len(found.sites),
        (before["batch_norm"], after["batch_norm"]),
        (before["convolution"], after["convolution"]),
        proof.error if proof else None,
        planned,
        FORWARDS * forward + PER_NODE * len(found.live.recording.nodes),
        time.perf_counter() - begun,
        dict(Counter(refusal.code for refusal in found.refusals)) if after["batch_norm"] else {},
        failure if proof is None or proof.passed else f"not proven: {proof.reason}",
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
        made.add_row(*cells(row), style="red" if row.failure else None)
    return made


def cells(row: Row) -> list[str]:
    """Return what stands in a row of the table."""
    if row.failure:
        return [row.name, row.failure]
    arrow = (f"{before} -> {after}" for before, after in (row.norms, row.convolutions))
    error = "" if row.error is None else f"{row.error:.1e}"
    seconds = (f"{each:.1f}" for each in (row.plan_seconds, row.allowed_seconds, row.seconds))
    slow = "slow; " if row.plan_seconds > row.allowed_seconds else ""
    why = slow + ", ".join(f"{count} {code}" for code, count in row.refusals.items())
    return [row.name, str(row.sites), *arrow, error, *seconds, why]


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
        progress.print("  ".join(cells(rows[-1])), soft_wrap=True)  # the table comes in an hour, or never
    console = Console(width=200)
    console.print(table(rows))
    failed = sum(bool(row.failure) for row in rows)
    console.print(f"{len(rows) - failed} of {len(rows)} converted and proven")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main())
