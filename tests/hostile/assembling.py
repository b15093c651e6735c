"""Pickles from opcodes, and archives from members of which every field may lie."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pickle import dumps

import torch

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")


def text(value: str) -> bytes:
    """Push text (BINUNICODE)."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def short(value: str) -> bytes:
    """Push text (SHORT_BINUNICODE, protocol 4)."""
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


def name(path: str) -> bytes:
    """Push the class or function ``module:name`` (GLOBAL)."""
    module, _, attribute = path.partition(":")
    return f"c{module}\n{attribute}\n".encode()


def push(value: object) -> bytes:
    """Push a plain value, without a trace in the memo."""
    return pickletools.optimize(dumps(value, 2))[2:-1]


def items(*parts: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(parts) + b"t"


def call(path: str, *arguments: bytes) -> bytes:
    """Push the result of a call (REDUCE)."""
    return name(path) + items(*arguments) + b"R"


def system(argument: bytes) -> bytes:
    """Push what os.system gives."""
    return call("os:system", argument)


def touching(canary: object) -> bytes:
    """Push the command that touches the canary."""
    return text(f"touch {canary}")


def pickled(body: bytes, protocol: int = 2) -> bytes:
    """Return a whole pickle."""
    return b"\x80" + bytes([protocol]) + body + b"."


def torch_archive(pickle: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """Return what torch.save writes, with ``pickle`` in place of its own."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    members = read_archive(buffer.getvalue())
    root = next(iter(members)).partition("/")[0]
    members[f"{root}/data.pkl"] = pickle
    members |= {f"{root}/data/{key}": data for key, data in (storages or {}).items()}
    members |= {f"{root}/{key}": data for key, data in more.items()}
    return write_archive(Member(path, data) for path, data in members.items())


def read_archive(data: bytes) -> dict[str, bytes]:
    """Return the members of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {member: archive.read(member) for member in archive.namelist()}


@dataclass
class Member:
    """A member as the archive will describe it; what is None is true."""

    name: str
    data: bytes
    method: int = zipfile.ZIP_STORED
    size: int | None = None  # unpacked
    packed: int | None = None
    offset: int | None = None  # of the local header
    local_name: str | None = None
    local_size: int | None = None
    flags: int = 0
    attributes: int = 0
    crc: int | None = None


def write_archive(
    members: Iterable[Member],
    *,
    before: bytes = b"",
    behind: bytes = b"",
    comment: bytes = b"",
    count: int | None = None,
    directory: int | None = None,
) -> bytes:
    """Return an archive; the keywords lie about its directory or put bytes around it."""
    body, entries = before, []
    for member in members:
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        size = len(member.data) if member.size is None else member.size
        packed = len(member.data) if member.packed is None else member.packed
        offset = len(body) if member.offset is None else member.offset
        local, path = (member.local_name or member.name).encode(), member.name.encode()
        said = size if member.local_size is None else member.local_size
        body += LOCAL.pack(b"PK\3\4", 20, member.flags, member.method, 0, 33, crc, packed, said, len(local), 0) + local
        body += member.data
        fields = (0x0314, 20, member.flags, member.method, 0, 33, crc, packed, size, len(path), 0, 0, 0, 0)
        entries.append(CENTRAL.pack(b"PK\1\2", *fields, member.attributes, offset) + path)
    listing, number = b"".join(entries), len(entries) if count is None else count
    start = len(body) if directory is None else directory
    return (
        body + listing + END.pack(b"PK\5\6", 0, 0, number, number, len(listing), start, len(comment)) + comment + behind
    )


def zeros(size: int) -> bytes:
    """Return ``size`` zero bytes, deflated: blocks that repeat, so that it costs nothing to make."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (size >> 20) + packer.flush()
