"""Weights in several files, whose index lies or leads elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from .attack import Attack

INDEX = "model.safetensors.index.json"
BUILT = {"model": "repfuse.samples:NotebookBlock"}
FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"
Prepare = Callable[[Path], object]
WRONG = {
    "nested without end": '{"weight_map":' + "[" * 100_000,
    "a number with a million digits": '{"weight_map": ' + "9" * 1_000_000 + "}",
    "a list": '["weight_map"]',
    "a map that is a list": '{"weight_map": [1]}',
    "a map of nothing": '{"weight_map": {}}',
    "a map of numbers": '{"weight_map": {"a": 7}}',
    "a map of NaN": '{"weight_map": {"a": NaN}}',
    "no JSON": '{"weight_map":',
    "not in UTF-8": '{"weight_map": "\udcff"}',
    "no map": "{}",
}


def put(folder: Path, file: str, **tensors: torch.Tensor) -> None:
    (folder / file).write_bytes(save(tensors))


def good(folder: Path) -> None:
    put(folder, FIRST, a=torch.ones(4))
    put(folder, SECOND, b=torch.ones(4))


def index(places: object, prepare: Prepare = good) -> Attack:
    """The index of ``places`` beside the files that ``prepare`` puts there."""
    return raw(json.dumps({"weight_map": places}), prepare)


def raw(text: str, prepare: Prepare = good) -> Attack:
    def make(folder: Path, _canary: Path) -> bytes:
        prepare(folder)
        return text.encode("utf-8", "surrogateescape")

    return Attack(make, name=INDEX, options=BUILT)


def named(*names: str) -> Attack:
    return index({f"a{number}": name for number, name in enumerate(names)})


def linked(folder: Path) -> None:
    """A hundred names of one file of 32 MiB."""
    put(folder, "large", a=torch.zeros(8 << 20))
    for number in range(100):
        (folder / f"{number}.safetensors").symlink_to(folder / "large")


def of_4_gb(folder: Path) -> None:
    good(folder)
    with (folder / "large.safetensors.index.json").open("wb") as file:
        file.write(b'{"weight_map": {')
        file.truncate(4 << 30)


def waiting(folder: Path) -> None:
    os.mkfifo(folder / FIRST)


def huge_header(folder: Path) -> None:
    with (folder / FIRST).open("wb") as file:
        file.write(((1 << 31) - 8).to_bytes(8, "little") + b"{")
        file.truncate(1 << 31)


def pickle(folder: Path) -> None:
    torch.save({"a": torch.ones(4)}, folder / FIRST)


MILLION: dict[str, Any] = {f"a{number}": f"{number}.safetensors" for number in range(20_000)}
SHARDS = {
    **{name: raw(text) for name, text in WRONG.items()},
    "names outside": named("../model-1.safetensors", "/etc/passwd", "a/../../x"),
    "the folder itself": named("."),
    "the folder above": named(".."),
    "nothing": named(""),
    "the index itself": named(INDEX),
    "a name of ten megabytes": named("x" * 10_000_000),
    "a name of five hundred characters": named("x" * 500),
    "half a character": named("\ud800"),
    "NUL": named("a\0b"),
    "control characters": named("\x1b]0;owned\x07"),
    "twenty thousand shards": index(MILLION),
    "a weight that is elsewhere": index({"a": SECOND, "b": FIRST}),
    "a weight that is nowhere": index({"a": FIRST, "b": SECOND, "c": SECOND}),
    "a weight in two shards": index(
        {"a": FIRST, "b": SECOND}, lambda folder: [put(folder, file, a=torch.ones(1)) for file in (FIRST, SECOND)]
    ),
    "a hundred names of one shard": index({f"a{n}": f"{n}.safetensors" for n in range(100)}, linked),
    "a shard that is a pipe": index({"a": FIRST}, waiting),
    "a shard that is a pickle": index({"a": FIRST}, pickle),
    "a header of 2 GB": index({"a": FIRST}, huge_header),
    "an index of 4 GB": Attack(
        lambda folder, _canary: bytes(of_4_gb(folder) or b"x"), name="x", loads="large.safetensors.index.json"
    ),
}
