"""The command line: one thin function per command. torch and Rich are imported inside them, so `--help` is quick."""

from __future__ import annotations

import sys
from typing import TextIO, cast

from repfuse.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an old code page must not end in an error about an arrow
            cast(TextIO, stream).reconfigure(errors="replace")  # type: ignore[attr-defined]
    app(prog_name="repfuse")
