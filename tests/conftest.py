"""What every test shares: importable torchvision, one thread, repeatable hypothesis, Python as processes."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import hypothesis
import pytest
import torch
from support import torchvision_schemas
from support.ticks import time_briefly
from support.torchlib import parse_once

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
SAMPLES = ROOT / "sample_checkpoints"

os.environ["REPFUSE_SAME_PROCESS"] = "1"  # for tests of other things: a fresh process per conversion takes seconds
torchvision_schemas.install()
torch.set_num_threads(1)  # the machine is shared by the workers of xdist
gc.set_threshold(100_000)  # what is imported and collected stays: Python would look through it hundreds of times
time_briefly()
hypothesis.settings.register_profile("dev", deadline=None, max_examples=20)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("many", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True, scope="module")
def what_stays() -> None:
    """Recording a network collects garbage, which takes long among all that was imported: that stays anyway."""
    let_stay(len(sys.modules))


@cache
def let_stay(_modules: int) -> None:
    """Once for so many modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def exports_are_quick() -> None:
    """Whatever loads onnxscript, and whenever it does."""
    parse_once()


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """Draw the same numbers in a test whichever ran before it in this worker.

    On the CPU: ``torch.manual_seed`` formats the stack for each kind of device that is not there, a millisecond's work.
    """
    torch.default_generator.manual_seed(0)


SERVER = "REPFUSE_SERVER"
"""In which folder the workers of xdist find the server that they share."""


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """Start a server of copies of Python (``serve.py``); give the folder of its sockets."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for listener, name in zip(listeners, ("loaded", "bare"), strict=True):
            listener.bind(str(Path(folder, name)))
            listener.listen()
        numbers = [listener.fileno() for listener in listeners]
        command = [sys.executable, str(SUPPORT / "serve.py"), *map(str, numbers), *options]
        with subprocess.Popen(command, env=_environment({}), stdin=PIPE, pass_fds=numbers):
            yield folder


def pytest_configure(config: pytest.Config) -> None:
    """Let all workers of xdist share one server: what it loads takes longer than most tests."""
    if config.getoption("numprocesses", None) and SERVER not in os.environ:
        stack = ExitStack()
        os.environ[SERVER] = stack.enter_context(serving("--all"))
        config.add_cleanup(stack.close)


Done = subprocess.CompletedProcess[str]
Run = Cli = Callable[..., Done]
READ_LATER = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONIOENCODING"}
"""The settings of Python's start that a copy of a process can still take."""


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of the sample checkpoints."""
    return SAMPLES


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run ``python ARGS`` as a process of its own: python("train.py", cwd=...), python("-c", "print(1)").

    Neither stdin nor stdout nor stderr is a terminal. timm and torchvision are importable in the process. It is a copy
    of one that has imported torch, which takes longer than most of what is run, and much else; if it is to be ``bare``,
    torch alone. With ``fresh``, or a setting of Python's start in ``env``, it is started as a shell does. ``largest``
    bounds the files that a copy may write.
    """
    out, err = (tmp_path_factory.mktemp("streams") / name for name in ("out", "err"))
    with ExitStack() as stack:
        server = Path(os.environ.get(SERVER) or stack.enter_context(serving()))

        @cache
        def connected(name: str) -> tuple[TextIO, TextIO]:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(server / name))
            return stack.enter_context(client.makefile("w")), stack.enter_context(client.makefile("r"))

        def run(
            *args: object,
            cwd: Path | None = None,
            env: dict[str, str] | None = None,
            timeout: float = 300,
            fresh: bool = False,
            bare: bool = False,
            largest: int | None = None,
        ) -> Done:
            words, environment = list(map(str, args)), _environment(env or {})
            if fresh or any(name.startswith("PYTHON") for name in (env or {}).keys() - READ_LATER):
                return subprocess.run(
                    [sys.executable, *words],
                    cwd=cwd,
                    env=environment,
                    stdin=DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=timeout,
                    check=False,
                )
            out.write_text("")
            err.write_text("")
            job = {"args": words, "cwd": str(cwd or Path.cwd()), "env": environment, "seconds": timeout}
            job |= {"out": str(out), "err": str(err), "largest": largest, "bare": bare}
            copies, codes = connected("bare" if bare else "loaded")
            print(json.dumps(job), file=copies, flush=True)
            return Done(words, int(codes.readline()), out.read_text("utf-8"), err.read_text("utf-8"))

        yield run


@pytest.fixture(scope="session")
def cli(python: Run) -> Cli:
    """Run ``repfuse ARGS`` as a process, as ``python`` does: cli("convert", path, out, cwd=..., columns=100)."""

    def run(*args: object, env: dict[str, str] | None = None, columns: int = 100, **options: Any) -> Done:
        return python("-m", "repfuse", *args, env={"COLUMNS": str(columns)} | (env or {}), **options)

    return run


@pytest.fixture(scope="session")
def digits_fused(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier of digits as the command converts it, with its report beside it: for tests that only read it."""
    out = tmp_path_factory.mktemp("digits") / "fused.pt"
    assert cli("convert", SAMPLES / "repvgg_digits.pt", out, "--quick").returncode == 0
    return out


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
