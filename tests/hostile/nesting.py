"""Pickles that hold themselves or nest without end, and counts that lie."""

from __future__ import annotations

from functools import cache

from torch import nn

from .assembling import call, name, pickled, push, text, torch_archive
from .attack import Attack, fixed

DEEP = 20_000
FIRST = 1000  # place in the memo that plain values do not use


def attack(body: bytes, protocol: int = 2) -> Attack:
    return Attack(fixed(torch_archive(pickled(body, protocol))))


def before(*steps: bytes) -> bytes:
    """Do these steps and leave a list on the stack, where nobody looks: torch's unpickler knows no POP."""
    return b"](" + b"".join(steps) + b"e"


def module(children: bytes, kind: str = "torch.nn.modules.container:Sequential") -> bytes:
    """Push a module with these children (a dict)."""
    return name(kind) + b")\x81" + rest_of_a_module() + text("_modules") + children + b"sb"


@cache
def rest_of_a_module() -> bytes:
    return push({key: value for key, value in vars(nn.ReLU()).items() if key != "_modules"})


def put(index: int) -> bytes:
    return b"r" + (FIRST + index).to_bytes(4, "little")


def get(index: int) -> bytes:
    return b"j" + (FIRST + index).to_bytes(4, "little")


def tree(children: list[list[int]], kind: str = "torch.nn.modules.container:Sequential") -> bytes:
    """Push the first of these modules, each given by the numbers of its children; children are filled in at the end."""
    number = len(children)
    made = [module(b"}" + put(n), kind) + put(number + n) for n in range(number)]
    filled = [
        get(n) + b"".join(text(f"m{place}") + get(number + child) + b"s" for place, child in enumerate(held))
        for n, held in enumerate(children)
    ]
    return before(*made) + before(*filled) + get(number)


def chain(length: int) -> list[list[int]]:
    return [[n + 1] for n in range(length)] + [[]]


def huge(opcode: bytes, length: int, count: bytes) -> bytes:
    return opcode + length.to_bytes(len(count), "little") + b"x" * 50


NESTING = {
    "a list in itself": attack(b"]q\x01h\x01a"),
    "a dict in itself": attack(b"}q\x01" + text("state_dict") + b"h\x01s"),
    "a tuple in itself": attack(b"]q\x01h\x01\x85a"),
    "an OrderedDict in its attributes": attack(call("collections:OrderedDict") + b"q\x01}" + text("x") + b"h\x01sb"),
    "a module in itself": attack(tree([[0]])),
    "modules in each other": attack(tree([[1], [0]])),
    "lists without end": attack(b"]" * DEEP + b"a" * (DEEP - 1)),
    "tuples without end": attack(b")" + b"\x85" * DEEP),
    "tuples without end as a key": attack(b"})" + b"\x85" * DEEP + b"Ns"),
    "dicts without end": attack((b"}" + text("a")) * DEEP + b"N" + b"s" * DEEP),
    "calls without end": attack(name("os:nice") * 3000 + b")" + b"\x85R" * 3000),
    "marks without end": attack(b"(" * DEEP + b"t" * DEEP),
    "modules without end": attack(tree(chain(2000))),
    "modules deeper than Python runs": attack(tree(chain(400))),
    "a key that nests without end": attack(b"})" + b"\x85" * 5000 + b"Ns"),
    "weights that nest without end": attack(
        b"}(" + text("model") + b"}" + text("x") + b"]" * 5000 + b"a" * 4999 + b"su"
    ),
    "BINBYTES8 of 2**62": attack(huge(b"\x8e", 1 << 62, bytes(8)), 4),
    "BINUNICODE8 of 2**62": attack(huge(b"\x8d", 1 << 62, bytes(8)), 4),
    "BYTEARRAY8 of 2**62": attack(huge(b"\x96", 1 << 62, bytes(8)), 5),
    "FRAME of 2**62": attack(huge(b"\x95", 1 << 62, bytes(8)), 4),
    "BINUNICODE of 4 GB": attack(huge(b"X", (1 << 32) - 1, bytes(4))),
    "BINSTRING of 2 GB": attack(huge(b"T", (1 << 31) - 1, bytes(4))),
    "BINSTRING of less than nothing": attack(huge(b"T", 1 << 31, bytes(4))),
    "LONG4 of 2 GB": attack(huge(b"\x8b", (1 << 31) - 1, bytes(4))),
    "LONG with a million digits": attack(b"L" + b"9" * 1_000_000 + b"L\n"),
    "INT with a million digits": attack(b"I" + b"9" * 1_000_000 + b"\n"),
    "LONG_BINPUT at 4 billion": attack(b"}r\xff\xff\xff\xff"),
    "GET of nothing": attack(b"h\x07"),
    "an empty stack": attack(b"R"),
    "no STOP": Attack(fixed(torch_archive(b"\x80\x02}"))),
    "no pickle": Attack(fixed(torch_archive(b""))),
    "protocol 255": attack(b"}", 255),
    "a name that is not text": attack(b"c\xff\xff\n\xff\xff\n"),
    "a name of ten megabytes": attack(b"cos\n" + b"x" * 10_000_000 + b"\n)R"),
    "text of ten megabytes as a key": attack(b"}" + text("x" * 10_000_000) + b"Ns"),
    "a type of ten megabytes in a network": attack(module(b"}", "torch.nn:" + "x" * 10_000_000)),
    "half a character": attack(b"X\x03\0\0\0\xed\xa0\x80"),
    "control characters": attack(b"}" + text("state\x1b]0;owned\x07") + b"Ns"),
}
