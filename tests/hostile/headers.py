"""safetensors files whose headers lie."""

from __future__ import annotations

import json
from typing import Any

from .attack import Attack, fixed

OPTIONS = {"model": "torch.nn:Identity"}


def file(header: object, data: bytes = bytes(16), *, length: int | None = None) -> Attack:
    """A file with this header (JSON, or text as it is); ``length`` is what the file says of it."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    said = len(text) if length is None else length
    return Attack(fixed(said.to_bytes(8, "little") + text + data), options=OPTIONS)


def tensor(shape: Any = (4,), start: Any = 0, end: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'

HEADERS = {
    "overlapping tensors": file({"a": tensor(), "b": tensor((4,), 8, 24)}, bytes(24)),
    "two tensors on one place": file({"a": tensor(), "b": tensor()}),
    "a gap": file({"a": tensor(), "b": tensor((4,), 20, 36)}, bytes(36)),
    "offsets beyond the file": file({"a": tensor((1 << 20,), 0, 1 << 22)}),
    "offsets of 2**63": file({"a": tensor((1 << 61,), 0, 1 << 63)}),
    "offsets of 2**70": file({"a": tensor((1 << 68,), 0, 1 << 70)}),
    "offsets that go back": file({"a": tensor((4,), 16, 0)}),
    "negative offsets": file({"a": tensor((4,), -16, 0)}),
    "offsets that are text": file({"a": tensor((4,), "0", "16")}),
    "offsets of three": file('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8,16]}}'),
    "a shape that is larger": file({"a": tensor((400,))}),
    "a shape of 2**60 and nothing": file({"a": tensor((1 << 60, 0), 0, 0)}, b""),
    "a shape of 2**63 and nothing": file({"a": tensor((1 << 63, 0), 0, 0)}, b""),
    "a shape of 2**64 - 1 and nothing": file({"a": tensor(((1 << 64) - 1, 0), 0, 0)}, b""),
    "a shape whose product overflows to its size": file({"a": tensor((1 << 62, 16), 0, 0)}, b""),
    "a negative shape": file({"a": tensor((-4,))}),
    "a shape of thousands of axes": file({"a": tensor([1] * 5000, 0, 4)}, bytes(4)),
    "a wider dtype": file({"a": tensor(dtype="F64")}),
    "an unknown dtype": file({"a": tensor(dtype="F7")}),
    "a dtype of half a byte": file({"a": tensor((32,), dtype="F4")}),
    "a dtype of six bits": file({"a": tensor((4,), 0, 3, dtype="F6_E2M3")}, bytes(3)),
    "a dtype of eight bits": file({"a": tensor((16,), dtype="F8_E8M0")}),
    "a complex dtype": file({"a": tensor((2,), dtype="C64")}),
    "a dtype that is a number": file({"a": tensor(dtype=7)}),
    "one key twice": file("{" + GOOD + "," + GOOD + "}"),
    "one field twice": file('{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "bytes behind": file({"a": tensor()}, bytes(4000)),
    "no tensors and many bytes": file({}, bytes(4000)),
    "header of 2 GB": file("{" + GOOD + "}", length=1 << 31),
    "header of 2**63": file("{" + GOOD + "}", length=1 << 63),
    "header of 2**64 - 1": file("{" + GOOD + "}", length=(1 << 64) - 1),
    "header of the file less one": file("{" + GOOD + "}", length=len(GOOD) + 17),
    "header of nothing": file("{" + GOOD + "}", length=0),
    "no JSON": file("{" + GOOD),
    "not in UTF-8": Attack(fixed((4).to_bytes(8, "little") + b"{\xff\xff}"), options=OPTIONS),
    "a list": file("{}"[:0] + "[1]"),
    "null": file('{"a":null}'),
    "NaN": file('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "metadata of NaN": file('{"__metadata__":{"a":NaN},' + GOOD + "}"),
    "metadata of numbers": file('{"__metadata__":{"a":1},' + GOOD + "}"),
    "metadata of lists": file('{"__metadata__":{"a":["x"]},' + GOOD + "}"),
    "metadata nested without end": file('{"__metadata__":' + "[" * 200_000 + "]" * 200_000 + "," + GOOD + "}"),
    "JSON nested without end": file("{" + '"a":{' * 100_000 + "}" * 100_000 + "}"),
    "a number with a million digits": file(
        '{"a":{"dtype":"F32","shape":[' + "9" * 1_000_000 + '],"data_offsets":[0,16]}}'
    ),
    "a name of ten megabytes": file('{"' + "x" * 10_000_000 + '":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "a name of nothing": file('{"":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "control characters": file({"weight\x1b]0;owned\x07": tensor()}),
    "half a character": file('{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "ten thousand tensors of nothing": file({f"a{n}": tensor((0,), 0, 0) for n in range(10_000)}, b""),
}
