"""Exported programs (.pt2): archives that lie, and pickles, numbers and structures that cost more than their bytes.

What torch would run of them is in ``test_exported_hostile``.
"""

from __future__ import annotations

import io
import json
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .archives import ARCHIVES, DEFLATED, also, bomb, changed, with_member
from .assembling import Member, pickled, read_archive, system, torch_archive, touching, write_archive, zeros
from .attack import Attack
from .calling import CALLING
from .nesting import NESTING
from .tensors import TENSORS

PROGRAM, INPUTS = "models/model.json", "sample_inputs/model.pt"
WEIGHTS = "model_weights_config.json"
HUGE = 1 << 33


@cache
def exported() -> bytes:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(block, (torch.randn(1, 3, 6, 6),)), buffer)
    return buffer.getvalue()


def good() -> list[Member]:
    """Return the members of a good file."""
    return [Member(path, data) for path, data in read_archive(exported()).items()]


def text(ending: str, change: Callable[[str], str], **options: Any) -> Attack:
    """Change a member that is JSON, as text."""
    return with_member(ending, data=lambda member: change(member.data.decode()).encode(), of=good, **options)


def parsed(ending: str, change: Callable[[Any], object], **options: Any) -> Attack:
    """Change a member that is JSON, as data."""

    def changed_text(old: str) -> str:
        data = json.loads(old)
        change(data)
        return json.dumps(data)

    return text(ending, changed_text, **options)


def given(attack: Attack) -> Attack:
    """The file of another attack as the sample inputs of a good program."""

    def make(folder: Path, canary: Path) -> bytes:
        return write_archive(
            replace_data(member, attack.make(folder, canary)) if member.name.endswith(INPUTS) else member
            for member in good()
        )

    return replace(attack, make=make, options={}, may_load=True)  # what holds no tensors may be left alone


def replace_data(member: Member, data: bytes) -> Member:
    member.data = data
    return member


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def sizes(*texts: str) -> Callable[[Any], None]:
    """Give the input these symbolic sizes."""
    return lambda program: graph(program)["tensor_values"]["input"].update(
        sizes=[{"as_expr": {"expr_str": text, "hint": None}} for text in texts] + [{"as_int": 6}] * (4 - len(texts))
    )


def without_inputs(*dimensions: int) -> Attack:
    """No sample inputs, and an input of these sizes: whoever wants an example makes it."""

    def change(members: list[Member]) -> list[Member]:
        for member in members:
            if member.name.endswith(INPUTS):
                buffer = io.BytesIO()
                torch.save(((), {}), buffer)
                member.data = buffer.getvalue()
            elif member.name.endswith(PROGRAM):
                program = json.loads(member.data)
                graph(program)["tensor_values"]["input"]["sizes"] = [{"as_int": size} for size in dimensions]
                member.data = json.dumps(program).encode()
        return members

    return changed(change, of=good)


def many_views(config: Any) -> None:
    """Thousands of weights that are one and the same number, seen as large."""
    form = config["config"]["0.weight"]
    form["tensor_meta"] |= {"sizes": [{"as_int": 1 << 20}], "strides": [{"as_int": 0}]}
    config["config"] |= {f"w{n}": form for n in range(3000)}


def node(change: Callable[[Any], object]) -> Callable[[Any], None]:
    return lambda program: change(graph(program)["nodes"][0])


def two_faced(_folder: Path, canary: Path) -> bytes:
    """A program before, and a pickle that calls behind: which of them is read depends on the reader."""
    return exported() + torch_archive(pickled(system(touching(canary))))


def other_order(_folder: Path, canary: Path) -> bytes:
    return torch_archive(pickled(system(touching(canary)))) + exported()


def both(_folder: Path, canary: Path) -> bytes:
    """A program and a pickle in one archive."""
    members = [*good(), Member("archive/data.pkl", pickled(system(touching(canary))))]
    return write_archive([*members, Member("archive/constants.pkl", pickled(system(touching(canary))))])


def size(number: int) -> str:
    return f"Symbol('s{number}', integer=True, positive=True)"


def tower(levels: int, below: str = "") -> str:
    """Remainders and largest ones of each other."""
    below = below or size(0)
    return below if not levels else tower(levels - 1, f"Max(Mod({below}, {size(levels)}), Integer({levels}))")


def numbered(member: str, number: str) -> Attack:
    """Put a number in the place of each."""
    return text(member, lambda old: re.sub(r'"as_int": \d+', f'"as_int": {number}', old))


INNER = {  # files whose pickles torch's own restricted unpickler would follow
    f"{kind}: {name}": attack
    for kind, table in (("tensor", TENSORS), ("nesting", NESTING), ("pickle", CALLING), ("archive", ARCHIVES))
    for name, attack in table.items()
    if "ten megabytes" not in name  # torch takes minutes for long names
}
ENDLESS = "[" * 100_000
MEMBERS = {
    **{
        f"bomb: {ending}": bomb(ending, of=good)
        for ending in (PROGRAM, "weight_0", ".data/version", "byteorder", "archive_format", INPUTS, WEIGHTS)
    },
    "bomb: beside the program": also("archive/extra/x", zeros(1 << 30), method=DEFLATED, size=1 << 30, crc=0, of=good),
    "bomb: small and honest": with_member(
        "weight_0", of=good, data=lambda _: zeros(64 << 20), method=DEFLATED, size=64 << 20, crc=0
    ),
    "a size beyond the file": with_member("weight_0", of=good, size=1 << 31, packed=1 << 31),
    "a size of 4 GB": with_member("weight_0", of=good, size=(1 << 32) - 1, packed=(1 << 32) - 1),
    "an offset into another member": with_member("weight_1", of=good, offset=0, may_load=True),
    "another size in the local header": with_member("weight_0", of=good, local_size=7, may_load=True),
    "a program that is a link": with_member(PROGRAM, of=good, attributes=(stat.S_IFLNK | 0o777) << 16, may_load=True),
    "an encrypted program": with_member(PROGRAM, of=good, flags=1),
    "one name twice": changed(lambda members: [*members, members[0]], of=good, may_load=True),
    "one name twice, but for case": also("ARCHIVE/MODELS/MODEL.JSON", of=good),
    "another folder": also("other/models/model.json", of=good),
    "traversal": also("archive/extra/../../../canary", of=good, may_load=True),
    "an absolute name": also("/tmp/canary", of=good),
    "backslashes": also("archive/extra/..\\canary", of=good, may_load=True),
    "NUL in a name": also("archive/extra/x\0.txt", of=good),
    "ten thousand members": changed(
        lambda members: [*members, *[Member(f"archive/extra/{n}", b"") for n in range(10_000)]], of=good, may_load=True
    ),
    "bytes that are no text beside the program": also("archive/extra/x", b"\xff\xfe", of=good),
    "a directory elsewhere": changed(lambda members: members, of=good, directory=7),
    "bytes behind": changed(lambda members: members, of=good, behind=b"x" * 50, may_load=True),
    "a pickle behind": Attack(two_faced),
    "a pickle before": Attack(other_order),
    "a pickle within": Attack(both),
    "no weights": changed(lambda members: [m for m in members if "weight_0" not in m.name], of=good),
    "no program": changed(lambda members: [m for m in members if PROGRAM not in m.name], of=good),
    "weights of another byte order": with_member("byteorder", of=good, data=b"big", may_load=True),
}
WRONG = {
    "nested without end": ENDLESS + "]" * len(ENDLESS),
    "never closed": ENDLESS,
    "a number with a million digits": '{"config": ' + "9" * 1_000_000 + "}",
    "NaN": "NaN",
    "a list": "[]",
    "a number": "7",
    "nothing": "",
    "half a character": '{"config": {"\\ud800": 1}}',
}
TEXTS = {
    **{
        f"{name} for {member}": text(member, lambda _, new=new: new)  # type: ignore[misc]
        for member in (PROGRAM, WEIGHTS)
        for name, new in WRONG.items()
    },
    **{
        f"numbers of {title} in {member}": numbered(member, number)
        for member in (PROGRAM, WEIGHTS)
        for title, number in {"2**33": str(1 << 33), "2**62": str(1 << 62), "4000 digits": "9" * 4000}.items()
    },
    "numbers below nothing": numbered(WEIGHTS, "-4"),
    "a weight of 2**33 bytes, seen as one": parsed(
        WEIGHTS, lambda config: config["config"]["0.weight"]["tensor_meta"].update(storage_offset={"as_int": 1 << 33})
    ),
    "weights that are one number": parsed(WEIGHTS, many_views),
    "an input of 2**33 and no sample": without_inputs(HUGE, 3, 6, 6),
    "an input of 2**31 and no sample": without_inputs(1, 3, 26_755, 26_755),
    "an input below nothing and no sample": without_inputs(-1, 3, 6, 6),
    "remainders of remainders": parsed(PROGRAM, sizes(tower(40))),
    "remainders by division": parsed(PROGRAM, sizes("FloorDiv(" * 200 + size(0) + ", Integer(3))" * 200)),
    "divided by nothing": parsed(PROGRAM, sizes(f"FloorDiv({size(0)}, Integer(0))")),
    "nan for a size": parsed(PROGRAM, sizes("Mod(oo, Integer(7))", "Add(oo, Mul(oo, Integer(-1)))")),
    "a range of a million digits": parsed(
        PROGRAM,
        lambda program: program["range_constraints"].update(s0={"min_val": 0, "max_val": 10**4000}),
        may_load=True,
    ),
    "a range that is empty": parsed(
        PROGRAM, lambda program: program["range_constraints"].update(s0={"min_val": 9, "max_val": 2})
    ),
    "a node of itself": parsed(PROGRAM, node(lambda it: it["inputs"][0].update(arg={"as_tensor": {"name": "conv2d"}}))),
    "a stride of 2**62": parsed(
        PROGRAM,
        node(lambda it: it["inputs"].append({"name": "stride", "arg": {"as_ints": [1 << 62, 1]}, "kind": 1})),
        may_load=True,
    ),
    "a padding of 2**40": parsed(
        PROGRAM,
        node(lambda it: it["inputs"].append({"name": "padding", "arg": {"as_ints": [1 << 40, 0]}, "kind": 1})),
        may_load=True,
    ),
    "control characters in a name": parsed(WEIGHTS, lambda config: config["config"].update({"\x1b]0;owned\x07": {}})),
    "a name of ten megabytes": parsed(WEIGHTS, lambda config: config["config"].update({"x" * 10_000_000: {}})),
    "another version": text(PROGRAM, lambda old: re.sub(r'"major": \d+', '"major": 99999999999999999999', old)),
}
EXPORTS = {**MEMBERS, **TEXTS, **{f"given {name}": given(attack) for name, attack in INNER.items()}}
