"""Writing a file as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_target(out: Path, source: Path, *, force: bool) -> None:
    """Raise RepfuseError where ``out`` must not be written: it is the input, a folder, or there already."""
    if out.is_dir():
        raise RepfuseError(f"{out} is a folder.", "The result is one file.", f"Give a file: {out / source.name}")
    if not out.parent.is_dir():
        raise RepfuseError(f"The folder {out.parent} does not exist.", "", f"Make it first: mkdir -p {out.parent}")
    if out.exists() and not out.is_file():
        raise RepfuseError(f"{out} is no regular file.", "It is a device or a pipe.", "Give the path of a file.")
    if out.exists() and source.exists() and out.samefile(source):
        raise RepfuseError(f"{out} is the input itself.", "repfuse never overwrites its input.", "Give another path.")
    if os.path.lexists(out) and not force:
        raise RepfuseError(f"{out} exists already.", "", "Give another path, or --force to replace it.")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give the path of a temporary file beside ``out``, which takes its place when the block ends without an error.

    On any error the temporary file goes and ``out`` stays as it was; trouble with the disk becomes a RepfuseError.
    """
    out = out.resolve()  # through a link, so that the link stays and its target is replaced
    try:
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise _unwritable(out, error) from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_mode(out))
        _sync(temporary)
        temporary.replace(out)
        _sync(out.parent)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _mode(out: Path) -> int:
    """Return the permissions of the file that is replaced, or those that a new file gets."""
    if out.exists():
        return out.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(out: Path, error: OSError) -> RepfuseError:
    return RepfuseError(
        f"{out} could not be written; nothing was changed.",
        error.strerror or str(error),
        "Free some space, or give a folder that you may write to.",
    )
