"""Runs `repfuse` often without loading torch as often: each command is a copy of this process, which has loaded it.

    python tests/support/serve.py    # and then a JSON object per line: args, cwd, env, out, err, seconds

What a command leaves in its process, and what it does to it, ends with that process, as at a shell.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback

LOADED = (
    *("rich.table", "safetensors.torch", "torch.utils.flop_counter", "typer"),
    *("repfuse.benching", "repfuse.converting", "repfuse.loading", "repfuse.plan_file", "repfuse.saving"),
    *("repfuse.checking.verification", "repfuse.report.convert_view", "repfuse.samples"),
)
"""Not repfuse.cli: it takes the time at which it is imported for that of the command."""


def main() -> None:
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each copy copies what it looks through for garbage
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            command(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def command(args: list[str], cwd: str, env: dict[str, str], out: str, err: str, seconds: float) -> None:
    """Be the command, and end."""
    signal.alarm(round(seconds))
    for stream, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR), stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - they end with the process
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0], sys.argv = os.getcwd(), ["repfuse", *args]
    code: object = 0
    try:
        runpy.run_module("repfuse", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)  # without taking torch down, which takes half a second


if __name__ == "__main__":
    main()
