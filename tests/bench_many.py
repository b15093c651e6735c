"""Measures what hundreds of checkpoints take: seconds, and peak memory of the command and of each process.

    python tests/bench_many.py [NUMBER]

The checkpoints are of three architectures; every twentieth is damaged, and one would run a command if it were
unpickled. They are converted with one job, with two and on a Dask cluster of two workers, then with two by a command
that is killed ten times and given again: the trees have to be the same. At last, as many of one small network are set
against single commands. It takes half an hour and wants a machine that does nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_readme import ROOT
from support.cluster import Cluster
from torch import nn

SAMPLES = ROOT / "sample_checkpoints"
SINGLES = 5
KILLED = 10
MIB = 2**20


def main(number: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has commands in the background ignore it
    with tempfile.TemporaryDirectory() as name, Cluster(Path(name) / "cluster") as cluster:
        folder = Path(name)
        marker = folder / "hacked"
        make(folder / "runs", number, marker)
        print("| | seconds | converted | failed | the command | its largest process |")
        print("| --- | --: | --: | --: | --: | --: |")
        ways = {"1 job": ("--jobs", "1"), "Dask": ("--dask", cluster.address), "2 jobs": ("--jobs", "2")}
        for title, options in ways.items():
            found = convert(folder / "runs", folder / title, *options)
            print(row(title, found), flush=True)
        killed(folder / "runs", folder / "killed", found["seconds"])
        trees = [tree(folder / out) for out in (*ways, "killed")]
        assert all(each == trees[0] for each in trees) and not marker.exists()
        print(f"killed {KILLED} times and given again: {len(trees[0])} files, all trees the same byte for byte")
        law(folder / "same", number // 2)


def make(folder: Path, number: int, marker: Path) -> None:
    """Write so many checkpoints; the hostile one would write ``marker``."""
    samples = (torch.load(SAMPLES / name, weights_only=False) for name in ("repvgg_digits.pt", "notebook_block.pt"))
    networks = (*samples, separable().eval())
    for index in range(number):
        path = folder / f"{index:03}" / "best.pt"
        path.parent.mkdir(parents=True)
        if index % 20 == 7:
            path.write_bytes(random.Random(index).randbytes(5000))
        elif index == number // 2:
            path.write_bytes(pickle.dumps(Hostile(marker)))
        else:
            torch.save(moved(networks[index % 3], index), path)


class Hostile:
    """Runs a command as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def separable() -> nn.Module:
    def part(*sizes: int, **settings: Any) -> tuple[nn.Module, ...]:
        return nn.Conv2d(*sizes, bias=False, **settings), nn.BatchNorm2d(sizes[1]), nn.ReLU()

    return nn.Sequential(*part(3, 16, 3, 2, 1), *part(16, 16, 3, 1, 1, groups=16), *part(16, 32, 1))


def moved(network: nn.Module, seed: int) -> nn.Module:
    """Move the weights of a network a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return network


def command(runs: Path, out: Path, *ways: str) -> list[str]:
    pattern = str(runs / "*" / "best.pt")
    return [sys.executable, "-m", "repfuse", "convert", pattern, "--into", str(out), "--json", *ways]


def convert(runs: Path, out: Path, *ways: str) -> dict[str, Any]:
    """Run the command to its end, and return what it printed and the seconds that it took."""
    began = time.perf_counter()
    asked = ["sh", "-c", '"$@"; exit', "sh", *command(runs, out, *ways)]  # a peak counts what the one before exec had
    done = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"seconds": time.perf_counter() - began}


def row(title: str, found: dict[str, Any]) -> str:
    status = [each["status"] for each in found["results"]]
    cells = [title, f"{found['seconds']:.0f}", str(status.count("converted")), str(status.count("failed"))]
    peaks = (found["peak"], max(each["peak"] for each in found["results"]))
    return f"| {' | '.join([*cells, *(f'{peak / MIB:.0f} MiB' for peak in peaks)])} |"


def tree(out: Path) -> dict[str, str]:
    """Return all files with their digests; of reports, which hold times, only the name."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return {name: "" if name.endswith(".report.json") else digest for name, digest in digests.items()}


def killed(runs: Path, out: Path, seconds: float) -> None:
    """Let a command that takes so many seconds be killed at random moments, and at last be given to its end."""
    moments, asked = random.Random(0), command(runs, out, "--jobs", "2")
    for _ in range(KILLED):
        process = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0, 2 * seconds / KILLED))
        process.send_signal(moments.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)))
        process.wait()
    convert(runs, out, "--jobs", "2")


def law(folder: Path, number: int) -> None:
    """Set many checkpoints of one small network against single commands."""
    network = torch.load(SAMPLES / "repvgg_digits.pt", weights_only=False)
    for index in range(number):
        (path := folder / f"{index:03}").mkdir(parents=True)
        torch.save(moved(network, index), path / "best.pt")
    began = time.perf_counter()
    for index in range(SINGLES):
        single = (folder / f"{index:03}" / "best.pt", folder / f"{index}.pt")
        subprocess.run([sys.executable, "-m", "repfuse", "convert", *map(str, single), "--quiet"], check=True)
    each = (time.perf_counter() - began) / SINGLES
    print(f"{number} of one network: {each:.2f} s each by single commands")
    for jobs in ("1", "2"):
        found = convert(folder, folder / f"with {jobs}", "--jobs", jobs)["seconds"] / number
        print(f"with --jobs {jobs}: {found:.2f} s each, {found / each:.2f} of that", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 200)
