"""The command line: one thin function per command. torch is imported inside them, so `--help` is quick."""

from __future__ import annotations

import atexit
import gc
import sys
import time
from typing import TextIO, cast

STARTED = time.perf_counter()  # before what takes long to import: the times that are printed are those of a clock

from repfuse.cli.app import app  # noqa: E402

__all__ = ["app", "main"]

OBJECTS = 300_000
"""Objects that are made before Python looks for garbage: libraries make as many, and they stay."""


def main() -> None:
    """Run the command line."""
    gc.set_threshold(OBJECTS)
    atexit.register(gc.freeze)  # nor is it looked for at the end, which would take half a second that is waited for
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an old code page must not end in an error about an arrow
            cast(TextIO, stream).reconfigure(errors="replace")  # type: ignore[attr-defined]
    app(prog_name="repfuse")
