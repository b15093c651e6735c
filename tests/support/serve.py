"""Runs Python often without loading torch as often: each program is a copy of this process, which has loaded it.

    python tests/support/serve.py LOADED BARE [--all]    # two sockets that listen, by number

Who connects to the first sends a JSON object per line, the arguments of `run`, and reads an exit code for each;
programs that are to find torch loaded alone are sent to the second. It ends when its stdin does. What a program leaves
in its process, and what it does to it, ends with that process, as at a shell.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing.context
import os
import resource
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

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


def main(loaded: str, bare: str, *options: str) -> None:
    """Serve whoever connects; load nothing before somebody does, and with ``--all`` then all that any may need."""
    for_most, for_few = socket.socket(fileno=int(loaded)), socket.socket(fileno=int(bare))
    if not wait_for(for_most, for_few):
        return
    importlib.import_module("torch")
    if os.fork() == 0:
        load_for_most()
        if "--all" in options:
            load(HEAVY)
        answer(for_most)
    answer(for_few)


def wait_for(*listeners: socket.socket) -> bool:
    """Wait until somebody connects; return False where nobody will any more."""
    ready, _, _ = select.select([*listeners, sys.stdin], [], [])
    return sys.stdin not in ready


def load_for_most() -> None:
    from ticks import time_briefly

    for name in LOADED:
        importlib.import_module(name)
    time_briefly()


def answer(listener: socket.socket) -> NoReturn:
    """Give each that connects a copy of this process, which serves nobody else."""
    gc.collect()
    gc.freeze()  # or each copy copies what it looks through for garbage
    sys.path[:] = _path()
    while wait_for(listener):
        client, _ = listener.accept()
        if os.fork() == 0:
            with client, client.makefile("r") as jobs, client.makefile("w") as codes:
                serve(jobs, codes)
            os._exit(0)
        client.close()
    with suppress(ChildProcessError):
        while True:
            os.wait()  # and so their time counts as that of the tests
    os._exit(0)


def serve(jobs: TextIO, codes: TextIO) -> None:
    """Answer each job, by a copy of this process; what one program needed is loaded from then on."""
    heavy, tell = os.pipe()
    os.set_blocking(heavy, False)
    for line in jobs:
        job = json.loads(line)
        for sign, names in FORETOLD.items() if not job["bare"] else ():
            if any(sign in word for word in job["args"]):
                load(names)
        print(copied(job, tell), file=codes, flush=True)
        with suppress(BlockingIOError):
            load(os.read(heavy, 1 << 16).decode().split())


def load(names: Iterable[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with suppress(ImportError):  # what is not installed, the program itself says
                importlib.import_module(name)
            if name == TORCHLIB and name in sys.modules:
                parse_all()


def copied(job: dict[str, Any], tell: int) -> int:
    if (child := os.fork()) == 0:
        run(**job, tell=tell)
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
    tell: int,
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
        commands: Any = sys.modules["repfuse.cli"]
        commands.STARTED = time.perf_counter()  # it was imported long ago
        commands.program = commands.main  # which leaves the end to this program, that has something to tell then
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
    if not bare:
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
    main(*sys.argv[1:])
