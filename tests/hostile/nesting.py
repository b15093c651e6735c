"""Pickles that hold themselves, nest without end, or grow each time that they are looked at; and counts that lie."""

from __future__ import annotations

from torch import nn

from .assembling import call, name, pickled, push, text, torch_archive
from .attack import Attack, fixed

DEEP = 20_000
FIRST = 1000  # place in the memo that plain values do not use
DOUBLINGS = 60


def attack(body: bytes, protocol: int = 2) -> Attack:
    return Attack(fixed(torch_archive(pickled(body, protocol))))


def before(*steps: bytes) -> bytes:
    """Do these steps and leave a list on the stack, where nobody looks: torch's unpickler knows no POP."""
    return b"](" + b"".join(steps) + b"e"


def attack_after(steps: bytes, body: bytes) -> Attack:
    return attack(before(steps) + body)


DOUBLED = b")q\x01" + b"h\x01h\x01\x86q\x01" * DOUBLINGS  # memo 1: a tuple that holds the one below twice, 60 times


def module(children: bytes, kind: str = "torch.nn.modules.container:Sequential") -> bytes:
    """Push a module with these children (a dict)."""
    rest = push({key: value for key, value in vars(nn.ReLU()).items() if key != "_modules"})
    return name(kind) + b")\x81" + rest + text("_modules") + children + b"sb"


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


def lattice(levels: int) -> list[list[int]]:
    """Modules whose innermost one is reached in 2**levels ways, through two modules on each level."""
    return [[1, 2], *[[2 * n + 1, 2 * n + 2] for n in range(1, levels) for _ in range(2)], [], []]


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
    "modules in 2**60 ways": attack(tree(lattice(DOUBLINGS))),
    "modules in 2**60 ways, with --model": Attack(
        fixed(torch_archive(pickled(tree(lattice(DOUBLINGS), "nowhere:Net")))),
        options={"model": "torch.nn:Identity"},
    ),
    "a key of 2**60 objects": attack_after(DOUBLED, b"}h\x01Ns"),
    "keys of 2**60 objects": attack_after(DOUBLED, b"}(h\x01Nu"),
    "a set of 2**60 objects": attack_after(DOUBLED, call("__builtin__:set", b"]h\x01a")),
    "sets of 2**60 objects": attack_after(DOUBLED, call("__builtin__:set", b"](h\x01h\x01e")),
    "a set of a set that is filled later": attack_after(
        DOUBLED,
        b"]q\x02"
        + before(call("__builtin__:set", b"h\x02"))
        + before(b"h\x02h\x01a", call("__builtin__:set", b"h\x02")),
    ),
    "a counter of 2**60 objects": attack_after(DOUBLED, call("collections:Counter", b"]h\x01a")),
    "a dict of 2**60 objects": attack_after(DOUBLED, call("collections:OrderedDict", b"]h\x01N\x86a")),
    "an attribute of 2**60 objects": attack_after(DOUBLED, call("collections:OrderedDict") + b"}h\x01Nsb"),
    "metadata of 2**60 objects": attack_after(DOUBLED, b"}" + text("model") + b"h\x01s"),
    "one set again and again": attack(
        before(b"](" + b"".join(b"K" + bytes([n % 256]) + b"K\2\x86" for n in range(20_000)) + b"eq\x01")
        + before(call("__builtin__:set", b"h\x01") * 20_000)
        + b"N"
    ),
    "one dict again and again": attack(
        before(b"}(" + b"".join(b"J" + n.to_bytes(4, "little") + b"N" for n in range(20_000)) + b"uq\x01")
        + call("collections:OrderedDict")
        + b"h\x01b" * 20_000
    ),
    "a key that nests without end": attack(b"})" + b"\x85" * 5000 + b"Ns"),
    "weights that nest without end": attack(
        b"}(" + text("model") + b"}" + text("x") + b"]" * 5000 + b"a" * 4999 + b"su"
    ),
    "millions of empty tuples": Attack(fixed(torch_archive(b"\x80\x02(" + b")" * 2_000_001 + b"t.")), slow=True),
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
    "a hundred thousand names": attack(before(b"".join(name(f"pkg{n}:x") for n in range(100_000)))),
    "half a character": attack(b"X\x03\0\0\0\xed\xa0\x80"),
    "control characters": attack(b"}" + text("state\x1b]0;owned\x07") + b"Ns"),
}
