"""Files in torch's format from before version 1.6: pickles in a row, then the numbers."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

from .assembling import call, items, name, pickled, push, system, text, touching
from .attack import Attack, fixed

MAGIC, VERSION, SYSTEM = (pickled(push(value)) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
OPTIONS = {"model": "torch.nn:Identity"}


def file(body: bytes, keys: object = (), data: bytes = b"") -> bytes:
    return MAGIC + VERSION + SYSTEM + pickled(body) + pickled(push(list(keys))) + data  # type: ignore[call-overload]


def storage(count: object, view: object = None) -> bytes:
    parts = (text("storage"), name("torch:FloatStorage"), text("0"), text("cpu"), push(count), push(view))
    return items(*parts) + b"Q"


def tensor(size: object, of: bytes, stride: object = (1,)) -> bytes:
    parts = (of, b"K\0", push(size), push(stride), b"\x89", call("collections:OrderedDict"))
    return b"}" + text("weight") + call("torch._utils:_rebuild_tensor_v2", *parts) + b"s"


def weights(size: object, of: bytes, data: bytes = (4).to_bytes(8, "little") + bytes(16), **more: object) -> Attack:
    return Attack(fixed(file(tensor(size, of, **more), ["0"], data)), options=OPTIONS)


def runs(make: Callable[[bytes], bytes]) -> Attack:
    return Attack(lambda _, canary: make(system(touching(canary))), executes=True)


def archive(canary: object) -> bytes:
    """A tar archive whose first name begins like the other files: torch tries tar first."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in ("\x80\x02\x8a\nl", "../canary", "storages", "tensors", "pickle"):
            data = pickled(system(touching(canary)))
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    raw = bytearray(buffer.getvalue())
    raw[: len(MAGIC)] = MAGIC[: len(MAGIC)]
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def cut(body: bytes) -> Attack:
    return Attack(fixed(MAGIC + VERSION + SYSTEM + b"\x80\x02" + body + bytes(50)))


LEGACY = {
    "REDUCE": runs(file),
    "in the version": runs(lambda body: MAGIC + pickled(body)),
    "in the system": runs(lambda body: MAGIC + VERSION + pickled(body)),
    "in the keys": runs(lambda body: MAGIC + VERSION + SYSTEM + pickled(b"}") + pickled(body)),
    "in a tar archive": Attack(lambda _, canary: archive(canary), executes=True),
    "source of a module": Attack(
        fixed(file(items(text("module"), name("torch.nn:Identity"), text("x.py"), text("import os")) + b"Q"))
    ),
    "a storage of 2**60": weights((4,), storage(1 << 60)),
    "a storage of a gigabyte": weights((4,), storage(1 << 28)),
    "a negative storage": weights((4,), storage(-4)),
    "a storage of less than its bytes": weights((1,), storage(1)),
    "numbers that are missing": weights((4,), storage(4), b""),
    "numbers of another count": weights((4,), storage(4), (1 << 40).to_bytes(8, "little") + bytes(16)),
    "2**60 numbers": weights((1 << 60,), storage(4)),
    "a gigabyte of numbers": weights((1 << 28,), storage(4)),
    "2**60 numbers that are one": weights((1 << 60,), storage(4), stride=(0,)),
    "a view beyond its storage": weights((4,), storage(4, ("7", 1 << 40, 4))),
    "a view before its storage": weights((4,), storage(4, ("7", -4, 4))),
    "a view of 2**60": weights((4,), storage(4, ("7", 0, 1 << 60))),
    "keys that are not there": Attack(fixed(file(tensor((4,), storage(4)), ["0", "1"], bytes(24))), options=OPTIONS),
    "keys without end": Attack(fixed(file(tensor((4,), storage(4)), ["0"] * 10_000, bytes(24))), options=OPTIONS),
    "text of 4 GB": cut(b"X\xff\xff\xff\xffx"),
    "bytes of 2**62": Attack(
        fixed(MAGIC + VERSION + SYSTEM + b"\x80\x02\x8e" + (1 << 62).to_bytes(8, "little") + bytes(50))
    ),
    "text of 2**62": Attack(
        fixed(MAGIC + VERSION + SYSTEM + b"\x80\x02\x8d" + (1 << 62).to_bytes(8, "little") + bytes(50))
    ),
    "the magic number alone": Attack(fixed(MAGIC)),
    "half the magic number": Attack(fixed(MAGIC[:8])),
    "another version": Attack(fixed(MAGIC + pickled(push(7)) + SYSTEM + pickled(b"}") + pickled(b"]"))),
    "pickles without end": Attack(fixed(MAGIC * 10_000)),
}
