"""Valid files of each format, and how to damage them. A new format is one row of ``FORMATS``."""

from __future__ import annotations

import io
import json
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from repfuse.loading import load
from repfuse.samples import NotebookBlock

from .assembling import Member, read_archive, write_archive
from .exports import exported
from .graphs import graph
from .plans import made, replays
from .recipes import GOOD, written
from .shards import INDEX
from .snapshots import GOOD as CONFIG

OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
GLOBALS = [b"cos\nsystem\n", b"ctorch\nTensor\n", b"c__builtin__\nbytearray\n", b"ctorch._utils\n_rebuild_parameter\n"]
NUMBERS = [
    value.to_bytes(size, "little")
    for size in (1, 2, 4, 8)
    for value in (0, 1, 1 << (8 * size - 1), (1 << (8 * size)) - 1)
]
Mutate = Callable[[bytes], bytes]


def torch_file(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def network() -> NotebookBlock:
    torch.manual_seed(0)
    return NotebookBlock(4).eval()


def training() -> dict[str, Any]:
    block = network()
    optimizer = torch.optim.SGD(block.parameters(), 0.1, momentum=0.9)
    scales = {"lr": [0.1, 0.01], "best": (1, 2.5), "names": {"a", "b"}, "raw": b"\0\1"}
    return {"epoch": 3, "state_dict": block.state_dict(), "optimizer": optimizer.state_dict(), "extra": scales}


def recipe() -> bytes:
    return written(json.dumps(GOOD))


BUILT = {"model": "repfuse.samples:NotebookBlock", "model_args": ["channels=4"]}
FORMATS: dict[str, tuple[Callable[[], bytes], dict[str, Any]]] = {  # how to write one, options to load it
    "module": (lambda: torch_file(network()), {}),
    "state dict": (lambda: torch_file(network().state_dict()), BUILT),
    "training checkpoint": (lambda: torch_file(training()), BUILT),
    "legacy": (
        lambda: torch_file(network().state_dict(), _use_new_zipfile_serialization=False),
        BUILT,
    ),
    "safetensors": (lambda: save(network().state_dict()), BUILT),
    "safetensors with a recipe": (recipe, {}),
}


@dataclass(frozen=True)
class Beside:
    """A file among others: its ``name``, who puts the others into its folder, and what is loaded."""

    name: str = "in"
    prepare: Callable[[Path], object] = lambda _: None
    loads: str = "in"
    by: Callable[..., Any] = load


def shard(folder: Path) -> None:
    names = list(network().state_dict())
    (folder / "1.safetensors").write_bytes(save({name: network().state_dict()[name] for name in names}))


def snapshot(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(save(timm.create_model("test_byobnet", num_classes=3).state_dict()))


FORMATS |= {
    "pt2": (exported, {}),
    "index": (
        lambda: json.dumps({"weight_map": dict.fromkeys(network().state_dict(), "1.safetensors")}).encode(),
        BUILT,
    ),
    "shard": (lambda: save(network().state_dict()), BUILT),
    "snapshot": (lambda: json.dumps(CONFIG).encode(), {}),
    "plan": (lambda: made().encode(), {}),
    "ONNX": (graph, {}),
}
BESIDE = {
    "index": Beside(INDEX, shard, INDEX),
    "shard": Beside("1.safetensors", lambda folder: (folder / INDEX).write_bytes(FORMATS["index"][0]()), INDEX),
    "snapshot": Beside("config.json", snapshot, "."),
    "plan": Beside(by=lambda path: replays(path, trust=False)),
}


def _place(data: bytes, where: float) -> int:
    return int(where * len(data))


def flip(where: float, bit: int) -> Mutate:
    def mutate(data: bytes) -> bytes:
        changed, place = bytearray(data), _place(data, where)
        if changed:
            changed[min(place, len(data) - 1)] ^= 1 << bit
        return bytes(changed)

    return mutate


def put(where: float, piece: bytes, over: bool) -> Mutate:
    """Insert a piece, or write it over what is there."""

    def mutate(data: bytes) -> bytes:
        place = _place(data, where)
        return data[:place] + piece + data[place + len(piece) * over :]

    return mutate


def cut(where: float, length: int) -> Mutate:
    return lambda data: data[: _place(data, where)] + data[_place(data, where) + length :]


def copy(source: float, target: float, length: int) -> Mutate:
    """Splice: put a stretch of the data somewhere else."""
    return lambda data: put(target, data[_place(data, source) :][:length], over=False)(data)


def end(where: float) -> Mutate:
    return lambda data: data[: _place(data, where)]


WHERE = st.floats(0, 1, exclude_max=True)
PIECES = st.one_of(
    st.binary(min_size=1, max_size=8), st.sampled_from(OPCODES), st.sampled_from(GLOBALS), st.sampled_from(NUMBERS)
)
MUTATIONS = st.one_of(
    st.builds(flip, WHERE, st.integers(0, 7)),
    st.builds(put, WHERE, PIECES, st.booleans()),
    st.builds(cut, WHERE, st.integers(1, 200)),
    st.builds(copy, WHERE, WHERE, st.integers(1, 400)),
    st.builds(end, WHERE),
)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Damage the bytes of the file, or those of one member of an archive that then is whole again."""
    mutations = draw(st.lists(MUTATIONS, min_size=1, max_size=4))
    if not good.startswith(b"PK") or draw(st.integers(0, 3)) == 0:
        return _all(mutations, good)
    members = [Member(name, data) for name, data in read_archive(good).items()]
    chosen = draw(st.sampled_from([0, 0, 0, *range(len(members))]))  # the first is the pickle
    members[chosen].data = _all(mutations, members[chosen].data)
    if draw(st.integers(0, 7)) == 0:  # swap two members
        one, other = (draw(st.sampled_from(members)) for _ in range(2))
        one.data, other.data = other.data, one.data
    return write_archive(members)


def _all(mutations: list[Mutate], data: bytes) -> bytes:
    for mutate in mutations:
        data = mutate(data)
    return data
