"""What every test shares: importable torchvision, one thread, repeatable hypothesis, the CLI as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
def cli() -> Cli:
    """Run ``repfuse ARGS`` as a process of its own: cli("convert", path, out, cwd=..., columns=100).

    Neither stdin nor stdout nor stderr is a terminal. timm and torchvision are importable in the process. ``before``
    runs in the process before the command.
    """

    def run(
        *args: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        columns: int = 100,
        timeout: float = 300,
        before: Callable[[], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "REPFUSE_"))}
        kept = {key: value for key, value in kept.items() if not key.endswith("_COLOR")}
        fixed = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),  # this tree, wherever it runs
            "OMP_NUM_THREADS": "1",
            "COLUMNS": str(columns),
            "PYTHONHASHSEED": "0",
            "REPFUSE_SAME_PROCESS": "1",
        }
        return subprocess.run(
            [sys.executable, "-m", "repfuse", *map(str, args)],
            cwd=cwd,
            env=kept | fixed | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            preexec_fn=before,
        )

    return run
