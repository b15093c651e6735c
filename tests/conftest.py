"""What every test shares: importable torchvision, one thread, repeatable hypothesis, the CLI as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import hypothesis
import pytest
import torch
from support import torchvision_schemas

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
SAMPLES = ROOT / "sample_checkpoints"

os.environ["REPFUSE_SAME_PROCESS"] = "1"  # for tests of other things: a fresh process per conversion takes seconds
torchvision_schemas.install()
torch.set_num_threads(1)  # the machine is shared by the workers of xdist
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of the sample checkpoints."""
    return SAMPLES


@pytest.fixture(scope="session")
def copies() -> Iterator[subprocess.Popen[str]]:
    """The process that commands are copies of."""
    command = [sys.executable, str(SUPPORT / "serve.py")]
    with subprocess.Popen(command, env=_environment({}), stdin=PIPE, stdout=PIPE, text=True) as process:
        yield process
        process.communicate()


@pytest.fixture(scope="session")
def cli(copies: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Run ``repfuse ARGS`` as a process of its own: cli("convert", path, out, cwd=..., columns=100).

    Neither stdin nor stdout nor stderr is a terminal. timm and torchvision are importable in the process. It is a copy
    of one that has imported torch, as that takes longer than most commands; with ``fresh``, or settings of Python's in
    ``env``, it is started as a shell does. ``before`` runs in such a process before the command.
    """
    out, err = (tmp_path_factory.mktemp("streams") / name for name in ("out", "err"))

    def run(
        *args: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        columns: int = 100,
        timeout: float = 300,
        before: Callable[[], None] | None = None,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        words, environment = list(map(str, args)), _environment({"COLUMNS": str(columns)} | (env or {}))
        if fresh or before or any(name.startswith("PYTHON") for name in env or {}):
            return subprocess.run(
                [sys.executable, "-m", "repfuse", *words],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                preexec_fn=before,
            )
        out.write_text("")
        err.write_text("")
        job = {"args": words, "cwd": str(cwd or Path.cwd()), "env": environment, "seconds": timeout}
        assert copies.stdin and copies.stdout
        print(json.dumps(job | {"out": str(out), "err": str(err)}), file=copies.stdin, flush=True)
        code = int(copies.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text("utf-8"), err.read_text("utf-8"))

    return run


def _environment(more: dict[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "REPFUSE_"))}
    kept = {key: value for key, value in kept.items() if not key.endswith("_COLOR")}
    fixed = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),  # this tree, wherever it runs
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "REPFUSE_SAME_PROCESS": "1",
    }
    return kept | fixed | more
