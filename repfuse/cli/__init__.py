"""The command line: one thin function per command. torch and Rich are imported inside them, so `--help` is quick."""

from __future__ import annotations

import sys
import time
from typing import TextIO, cast

STARTED = time.perf_counter()  # before what takes long to import: the times that are printed are those of a clock

from repfuse.cli.app import app  # noqa: E402
from repfuse.readback.process import collect_seldom  # noqa: E402

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    collect_seldom()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an old code page must not end in an error about an arrow
            cast(TextIO, stream).reconfigure(errors="replace")  # type: ignore[attr-defined]
    app(prog_name="repfuse")
