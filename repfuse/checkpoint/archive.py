"""What a ZIP archive must be before anything in it is read.

The rule: only what PyTorch itself writes. Every member is stored as it is, in its own place in the file, under one
folder and under one name. So an archive never unpacks to more than its size, and all readers see the same members:
Python's, which checks them, and PyTorch's, which loads them.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from itertools import pairwise
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from repfuse.checkpoint.recognise import damaged
from repfuse.errors import RepfuseError
from repfuse.wording import first_line

if TYPE_CHECKING:
    from pathlib import Path

END = struct.Struct("<4s4H2LH")  # the record that ends an archive: ..., size and offset of the directory, comment
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")  # stands between these two: ..., the offset of END64, ...
LOCAL_HEADER = 30  # bytes before the name


class UnsoundError(Exception):
    """Says what is wrong with an archive."""


def opened(path: Path, data: bytes | None = None) -> IO[bytes]:
    """Open the archive at ``path``, or ``data``, which is one in the file at ``path``."""
    return path.open("rb") if data is None else io.BytesIO(data)


def members_of(path: Path, data: bytes | None = None) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name; ``data`` is an archive in the file at ``path``, where it is not the file itself.

    Raises RepfuseError where the archive is not as PyTorch would write it.
    """
    try:
        with opened(path, data) as file, zipfile.ZipFile(file) as archive:
            _check_end(file, archive)
            _check_members(archive.infolist(), archive.start_dir)
            return {member.filename: member for member in archive.infolist()}
    except UnsoundError as error:
        raise RepfuseError(
            f"{path} is an archive that PyTorch would not have written.",
            f"{error}.",
            "Save the checkpoint again with torch.save, and give that file.",
        ) from error
    except Exception as error:  # a damaged archive can make its reader fail in any way
        raise damaged(path, first_line(error)) from error


def _check_end(file: IO[bytes], archive: zipfile.ZipFile) -> None:
    """Check that the directory stands where the very end of the file says: readers look for it in different ways."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - END.size - LOCATOR64.size - END64.size))
    tail = file.read()
    signature, _, _, _, count, length, offset, comment = END.unpack(tail[-END.size :])
    end = size - END.size
    if signature != b"PK\5\6" or comment:
        raise UnsoundError("Something stands behind its directory")
    locator = tail[-END.size - LOCATOR64.size : -END.size]
    if locator.startswith(b"PK\6\7"):
        end -= LOCATOR64.size + END64.size
        signature, *_, count, length, offset = END64.unpack(tail[: END64.size])
        if signature != b"PK\6\6" or LOCATOR64.unpack(locator)[2] != end:
            raise UnsoundError("Its directory is in two places")
    if (count, offset, offset + length) != (len(archive.infolist()), archive.start_dir, end):
        raise UnsoundError("Its directory is not where it says")


def _check_members(members: list[zipfile.ZipInfo], end: int) -> None:
    for member in members:
        _check_name(member)
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise UnsoundError(f"{member.filename!r:.200} in it is compressed")
        if member.flag_bits & 0x1:
            raise UnsoundError(f"{member.filename!r:.200} in it is encrypted")
    if len({member.filename.casefold() for member in members}) < len(members):
        raise UnsoundError("It has one name twice")
    if len({member.filename.partition("/")[0] for member in members}) > 1:
        raise UnsoundError("It has more than one folder")
    places = sorted((member.header_offset, _end_of(member)) for member in members)
    if any(stop > start for (_, stop), (start, _) in pairwise([*places, (end, end)])):
        raise UnsoundError("Its members overlap")


def _end_of(member: zipfile.ZipInfo) -> int:
    return member.header_offset + LOCAL_HEADER + len(member.orig_filename) + member.file_size


def _check_name(member: zipfile.ZipInfo) -> None:
    name = PurePosixPath(member.orig_filename)
    if name.is_absolute() or ".." in name.parts or set(member.orig_filename) & set("\\\0"):
        raise UnsoundError(f"The name {member.orig_filename!r:.200} in it leads out of it")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UnsoundError(f"{member.filename!r:.200} in it is a link")
