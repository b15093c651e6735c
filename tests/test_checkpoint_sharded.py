"""Weights in shards: read as one state dict, or refused for what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file, save_file

import repfuse
from repfuse.errors import RepfuseError

MODEL = "repfuse.samples:DigitsRepVGG"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(samples: Path, tmp_path: Path) -> Path:
    """The digits' weights in three shards, as transformers writes them."""
    state = load_file(samples / "repvgg_digits.safetensors")
    made = tmp_path / "snapshot"
    made.mkdir()
    places = {name: f"model-0000{index % 3 + 1}-of-00003.safetensors" for index, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({name: state[name] for name in places if places[name] == shard}, made / shard, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in state.values())
    (made / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    return made


def test_shards_convert_to_one_file(folder: Path, cli: Cli, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = cli("convert", folder, tmp_path / "fused.safetensors", "--model", MODEL, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["input"]["format"], report["output"]["format"]) == ("safetensors", "safetensors")
    assert len(report["plan"]["sites"]) == 5
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not any("running_mean" in name for name in load_file(tmp_path / "fused.safetensors"))


def test_the_names_and_values_are_those_of_the_single_file(folder: Path, samples: Path) -> None:
    one = repfuse.load(samples / "repvgg_digits.safetensors", model=MODEL)
    many = repfuse.load(folder, model=MODEL)
    state = many.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.module.state_dict().items())
    (folder / "model-00002-of-00003.safetensors").touch()
    assert many.digest == repfuse.load(folder / INDEX, model=MODEL).digest != one.digest


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-0000{number}-of-00003.safetensors"


def edited(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def resaved(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def outside(folder: Path, where: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(shard(folder, 1).read_bytes())
    edited(folder, lambda places: places.update({next(iter(places)): where}))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda folder: shard(folder, 2).unlink(), "1 of the 3 shards"),
    "name that no shard has": (lambda folder: resaved(shard(folder, 1), dict.popitem), "not in the shard"),
    "name that the index lacks": (lambda folder: edited(folder, dict.popitem), "do not fit"),
    "name in two shards": (
        lambda folder: resaved(shard(folder, 1), lambda held: held.update(load_file(shard(folder, 2)))),
        "another shard holds too",
    ),
    "parent": (lambda folder: outside(folder, "../outside.safetensors"), "outside its own folder"),
    "absolute path": (lambda folder: outside(folder, str(folder.parent / "outside.safetensors")), "outside its own"),
    "back slash": (lambda folder: outside(folder, "..\\outside.safetensors"), "outside its own"),
    "itself": (lambda folder: outside(folder, INDEX), "not a safetensors file"),
    "number": (lambda folder: edited(folder, lambda places: places.update(a=3)), "not a table of names"),
    "cut index": (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a'), "no index of shards"),
    "cut shard": (lambda folder: shard(folder, 1).write_bytes(shard(folder, 1).read_bytes()[:-9]), "damaged"),
    "torch shard": (lambda folder: torch.save({}, shard(folder, 1)), "not a safetensors file"),
    "nested without end": (lambda folder: (folder / INDEX).write_text('{"weight_map":' + "[" * 100_000), "no index"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what: str, folder: Path) -> None:
    spoil, said = WRONG[what]
    spoil(folder)
    with pytest.raises(RepfuseError, match=said) as error:
        repfuse.load(folder / INDEX, model=MODEL)
    assert error.value.exit_code == 2


def test_a_shard_is_never_overwritten(folder: Path) -> None:
    checkpoint = repfuse.load(folder, model=MODEL)
    with pytest.raises(RepfuseError, match="input itself"):
        repfuse.save(checkpoint, checkpoint.module, shard(folder, 1), force=True)


def test_a_folder_without_an_index_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="is a folder"):
        repfuse.load(tmp_path)
