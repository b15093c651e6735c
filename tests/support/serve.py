"""Runs Python often without loading torch as often: each program is a copy of this process, which has loaded it.

    python tests/support/serve.py    # and then a JSON object per line: the arguments of `run`

What a program leaves in its process, and what it does to it, ends with that process, as at a shell.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing.context
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from torchlib import parse_all

LOADED = (
    *("rich.table", "safetensors.torch", "shlex", "torch.utils.flop_counter", "torch.utils.serialization", "typer"),
    *("repfuse.benching.sites", "repfuse.cli.conversion", "repfuse.data"),
    *("repfuse.benching", "repfuse.converting", "repfuse.loading", "repfuse.plan_file", "repfuse.saving"),
    *("repfuse.checking.verification", "repfuse.report.convert_view", "repfuse.samples"),
    *("repfuse.cli.bench", "repfuse.cli.convert", "repfuse.cli.verify"),
)
TORCHLIB = "onnxscript.function_libs.torch_lib.ops"
HEAVY = (
    *("torch._dynamo", "torch.export", "torch._export.serde.serialize", "torch.export._trace", "torch._inductor.ir"),
    *("torch.onnx._internal.exporter._core", "torch.onnx._internal.exporter._torchlib.ops"),
    *("onnx_ir", "onnxscript", TORCHLIB, "onnxruntime"),
    *("timm", "PIL.Image", "jinja2", "pydantic", "typer._adapters"),
)
"""What takes long to load, and which not all programs need: the first that does is the last that loads it."""
FORETOLD = {
    ".pt2": ("torch._dynamo", "torch.export._trace", "torch._export.serde.serialize"),
    ".onnx": ("torch.onnx._internal.exporter._core", TORCHLIB, "onnxruntime"),
    "timm": ("timm",),
}
"""What a program of such arguments is going to need: then not even the first loads it."""


def main() -> None:
    """Answer each job by the exit code of a copy: of this process if it is to be ``bare``, or of one that has more."""
    importlib.import_module("torch")
    (given, jobs), (told, codes) = os.pipe(), os.pipe()
    if (loaded := os.fork()) == 0:
        os.close(jobs)
        with os.fdopen(given) as lines, os.fdopen(codes, "w") as answers:
            serve(lines, answers)
        os._exit(0)
    os.close(codes)
    sys.path[:] = _path()
    with os.fdopen(jobs, "w") as others, os.fdopen(told) as answers:
        for line in sys.stdin:
            if json.loads(line)["bare"]:
                print(copied(line), flush=True)
            else:
                print(line, end="", file=others, flush=True)
                print(answers.readline(), end="", flush=True)
    os.waitpid(loaded, 0)


def serve(jobs: TextIO, codes: TextIO) -> None:
    """Answer each job, by a copy of this process, which has loaded what most need, and from then on what one needed."""
    from ticks import time_briefly

    for name in LOADED:
        importlib.import_module(name)
    time_briefly()
    gc.collect()
    gc.freeze()  # or each copy copies what it looks through for garbage
    sys.path[:] = _path()
    heavy, tell = os.pipe()
    os.set_blocking(heavy, False)
    for line in jobs:
        for sign, names in FORETOLD.items():
            if any(sign in word for word in json.loads(line)["args"]):
                load(names)
        print(copied(line, tell), file=codes, flush=True)
        with suppress(BlockingIOError):
            load(os.read(heavy, 1 << 16).decode().split())


def load(names: Iterable[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with suppress(ImportError):  # what is not installed, the program itself says
                importlib.import_module(name)
            if name == TORCHLIB and name in sys.modules:
                parse_all()


def copied(job: str, tell: int | None = None) -> int:
    if (child := os.fork()) == 0:
        run(**json.loads(job), tell=tell)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(
    args: list[str],
    cwd: str,
    env: dict[str, str],
    out: str,
    err: str,
    seconds: float,
    largest: int | None,
    bare: bool,
    tell: int | None,
) -> None:
    """Be `python ARGS`, and end. ``largest`` bounds the files that it may write, in bytes.

    Which of HEAVY it loaded goes to ``tell``. Where checkpoints are converted each in a process of its own, copies of
    this one are these, if REPFUSE_FORKED says that it is as good as the server of copies that the command would start.
    """
    before = set(sys.modules)
    signal.alarm(round(seconds))
    for stream, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR), stream)
    modes, encoding = ("r", "w", "w"), env.get("PYTHONIOENCODING")
    streams = [open(each, mode, encoding=encoding, closefd=False) for each, mode in enumerate(modes)]  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = streams
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if not bare:
        sys.modules["repfuse.cli"].STARTED = time.perf_counter()  # type: ignore[attr-defined]  # it was imported long ago
    if "REPFUSE_FORKED" in env:
        contexts = multiprocessing.context._concrete_contexts
        contexts["forkserver"] = contexts["fork"]
    code: object = 0
    try:
        _run(*args)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if tell is not None:
        os.write(tell, "".join(f"{name} " for name in HEAVY if name in sys.modules.keys() - before).encode())
    os._exit(code if isinstance(code, int) else 0)  # without taking torch down, which takes half a second


def _path() -> list[str]:
    """Where Python looks, but for what is of this program."""
    own = {str(Path(__file__).parent), *os.environ["PYTHONPATH"].split(os.pathsep)}
    return [path for path in sys.path if path not in own]


def _run(program: str, *args: str) -> None:
    here = Path.cwd() if program.startswith("-") else Path(program).parent.absolute()
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    first = [] if "PYTHONSAFEPATH" in os.environ else [str(here)]
    sys.path[:0] = first + [str(Path(path).absolute()) for path in given]
    sys.argv = [program, *args]
    if program == "-m":
        sys.argv = list(args)
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    elif program == "-c":
        sys.argv = ["-c", *args[1:]]
        exec(args[0], {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
