"""The command line: one thin function per command. torch is imported inside them, so `--help` is quick."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import time
from typing import Any, TextIO, cast

STARTED = time.perf_counter()  # before what takes long to import: the times that are printed are those of a clock

from repfuse.cli.app import app  # noqa: E402

__all__ = ["app", "main", "program"]

OBJECTS = 300_000
"""Objects that are made before Python looks for garbage: libraries make as many, and they stay."""


def main() -> None:
    """Run the command line. Raises SystemExit at its end."""
    gc.set_threshold(OBJECTS)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an old code page must not end in an error about an arrow
            cast(TextIO, stream).reconfigure(errors="replace")  # type: ignore[attr-defined]
    app(prog_name="repfuse")


def program() -> None:
    """Be the `repfuse` program: run the command line, and end the process at once.

    To take apart what was imported, torch above all, takes Python a tenth of a second, which is waited for; mypy ends
    in the same way. It is left to Python where a thread is at work, somebody watches, or nobody reads what is left to
    be written.
    """
    try:
        main()
    except SystemExit as ended:
        others = {thread for thread in threading.enumerate() if not thread.daemon} - {threading.main_thread()}
        if others or _is_watched() or not isinstance(ended.code, int):
            raise
        atexit._run_exitfuncs()
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):  # there is none where a process was started without
                stream.flush()
        except (OSError, ValueError):
            raise ended from None
        os._exit(ended.code)


def _is_watched() -> bool:
    """Whether a profiler, a debugger or a measure of coverage is on: they have something to say at the end."""
    monitoring: Any = getattr(sys, "monitoring", None)  # since Python 3.12
    tools = map(monitoring.get_tool, range(6)) if monitoring else ()
    return any((sys.getprofile(), sys.gettrace(), *tools))
