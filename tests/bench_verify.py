"""Measures what `repfuse verify` takes: seconds and peak memory of whole processes. `make bench` runs it.

Memory is that of the process; what Python and torch take by themselves is measured apart, and what is left is given in
sizes of the original's checkpoint. Activations are in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench_readme import ROOT, repfuse
from safetensors.torch import save_file
from support import torchvision_schemas
from support.networks import timm_network

NETWORKS = ("resnet50", "repvgg_b1")
EFFORTS = ("--quick", "", "--thorough")
MIB = 2**20


class Used(NamedTuple):
    """Wall-clock seconds and the peak resident memory, in bytes, of one process."""

    seconds: float
    peak: int


def main() -> None:
    torchvision_schemas.install()
    alone = used(sys.executable, "-c", "import torch, repfuse.checking.verification, repfuse.checking.proof").peak
    print(f"Python and torch alone: {alone / MIB:.0f} MiB")
    print("| network | checkpoint | effort | seconds | peak | above torch alone, in checkpoints |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            measure(name, Path(folder), alone)


def measure(name: str, folder: Path, alone: int) -> None:
    """Print a row per effort."""
    source, fused = folder / f"{name}.safetensors", folder / f"{name}.fused.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in timm_network(name).state_dict().items()}, source)
    repfuse("convert", source, fused, "--model", f"timm:{name}")
    size = source.stat().st_size
    for effort in EFFORTS:
        command = (sys.executable, "-m", "repfuse", "verify", source, fused, "--model", f"timm:{name}", "--quiet")
        found = used(*map(str, command), *filter(None, [effort]))
        of_size = (found.peak - alone) / size
        cells = (
            name,
            f"{size / MIB:.0f} MiB",
            effort or "default",
            f"{found.seconds:.0f}",
            f"{found.peak / MIB:.0f} MiB",
        )
        print(f"| {' | '.join(cells)} | {of_size:.2f} |", flush=True)


def used(*command: str) -> Used:
    """Run a process to its end. Raises where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support")}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return Used(time.perf_counter() - started, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
