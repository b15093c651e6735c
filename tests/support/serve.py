"""Runs Python often without loading torch as often: each program is a copy of this process, which has loaded it.

    python tests/support/serve.py    # and then a JSON object per line: the arguments of `run`

What a program leaves in its process, and what it does to it, ends with that process, as at a shell.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from ticks import time_briefly

LOADED = (
    *("rich.table", "safetensors.torch", "torch.utils.flop_counter", "typer"),
    *("repfuse.benching", "repfuse.converting", "repfuse.loading", "repfuse.plan_file", "repfuse.saving"),
    *("repfuse.checking.verification", "repfuse.report.convert_view", "repfuse.samples"),
    *("repfuse.cli.bench", "repfuse.cli.convert", "repfuse.cli.verify"),
)
HEAVY = ("torch._dynamo", "torch.export", "timm", "onnx_ir", "onnxscript", "onnxruntime", "pydantic", "typer._adapters")
"""What takes long to load, and which not all programs need: the first that does is the last that loads it."""


def main() -> None:
    for name in LOADED:
        importlib.import_module(name)
    time_briefly()
    gc.collect()
    gc.freeze()  # or each copy copies what it looks through for garbage
    own = {str(Path(__file__).parent), *os.environ["PYTHONPATH"].split(os.pathsep)}
    sys.path[:] = [path for path in sys.path if path not in own]
    loaded, tell = os.pipe()
    os.set_blocking(loaded, False)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line), tell=tell)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        with suppress(BlockingIOError):
            for name in os.read(loaded, 1 << 16).decode().split():
                importlib.import_module(name)


def run(
    args: list[str], cwd: str, env: dict[str, str], out: str, err: str, seconds: float, largest: int | None, tell: int
) -> None:
    """Be `python ARGS`, and end. ``largest`` bounds the files that it may write, in bytes.

    Which of HEAVY it loaded goes to ``tell``.
    """
    before = set(sys.modules)
    signal.alarm(round(seconds))
    for stream, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR), stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - they end with the process
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.modules["repfuse.cli"].STARTED = time.perf_counter()  # type: ignore[attr-defined]  # it was imported long ago
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
    os.write(tell, "".join(f"{name} " for name in HEAVY if name in sys.modules.keys() - before).encode())
    os._exit(code if isinstance(code, int) else 0)  # without taking torch down, which takes half a second


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
