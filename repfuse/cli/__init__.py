"""The command line: one thin function per command. torch and Rich are imported inside them, so `--help` is quick."""

from __future__ import annotations

import atexit
import gc
import sys
import time
from typing import TextIO, cast

STARTED = time.perf_counter()  # before what takes long to import: the times that are printed are those of a clock

from repfuse.cli.app import app  # noqa: E402

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    gc.set_threshold(50_000)  # libraries make objects by the hundred thousand, and they stay: looking often is in vain
    atexit.register(gc.freeze)  # Python would look through them all at its end, for up to half a second
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an old code page must not end in an error about an arrow
            cast(TextIO, stream).reconfigure(errors="replace")  # type: ignore[attr-defined]
    app(prog_name="repfuse")
