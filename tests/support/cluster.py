"""Dask on this machine: processes that a test may kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


class Cluster:
    """A Dask scheduler and workers, each a process of its own, in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", str(folder / "scheduler.json"))
        self.address = json.loads(_when(folder / "scheduler.json"))["address"]
        self.workers = [self.worker() for _ in range(2)]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def worker(self) -> subprocess.Popen[bytes]:
        return self._start("worker", self.address, "--nthreads", "1", "--no-nanny")

    def _start(self, kind: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard", *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        said = (self.folder / f"{len(self.processes)}.log").open("wb")
        self.processes.append(subprocess.Popen(command, env=environment, cwd=self.folder, stderr=said, stdout=said))
        return self.processes[-1]


def _when(path: Path) -> str:
    """What is in a file, when there is something."""
    while not (path.exists() and path.read_text()):
        time.sleep(0.05)
    return path.read_text()
