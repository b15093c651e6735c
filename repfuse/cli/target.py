"""Where a command writes, and whether it can. torch is not needed to say no, so it is not imported."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from repfuse.checkpoint.atomic import check_target
from repfuse.errors import RepfuseError


def check_targets(targets: Sequence[Path], sources: Sequence[Path], *, force: bool) -> None:
    """Raise RepfuseError where a file, all in one folder, must not or cannot be written; ``sources`` are read."""
    for target, source in product(targets, sources):
        check_target(target, source, force=force)
    folder = targets[0].parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        what = f"Nothing can be written to the folder {folder}."
        raise RepfuseError(what, error.strerror or str(error), "Give a folder that you may write to.") from error
