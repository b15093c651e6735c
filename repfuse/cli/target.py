"""Where `repfuse convert` writes, and whether it can. torch is not needed to say no, so it is not imported."""

from __future__ import annotations

import tempfile
from pathlib import Path

from repfuse.checkpoint.atomic import check_target
from repfuse.errors import RepfuseError


def report_path(out: Path) -> Path:
    """Return where the report of ``out`` goes: fused.pt -> fused.report.json."""
    return out.with_suffix(".report.json")


def check_targets(out: Path, source: Path, *, force: bool) -> None:
    """Raise RepfuseError where ``out`` or its report must not or cannot be written."""
    for target in (out, report_path(out)):
        check_target(target, source, force=force)
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        what = f"Nothing can be written to the folder {out.parent}."
        raise RepfuseError(what, error.strerror or str(error), "Give a folder that you may write to.") from error
