"""Finding the network in a file, and what stands around it."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.agreement import randomised
from torch import Tensor, nn

from repfuse import RepfuseError, load, save
from repfuse.loading import Checkpoint

KEYS = (
    *("state_dict_ema", "model_ema", "ema", "ema_model", "params_ema", "ema_state_dict"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "params", "net", "network"),
)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


STATE = OrderedDict(randomised(net(), dtype=torch.float32).state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contents")


def opened(tree: Any, folder: Path, **options: Any) -> Checkpoint:
    torch.save(tree, folder / "in.pt")
    return load(folder / "in.pt", model=f"{__name__}:net", input="1x2x4x4", **options)


def same_weights(found: Checkpoint | dict[str, Tensor]) -> bool:
    state = found.module.state_dict() if isinstance(found, Checkpoint) else found
    return list(state) == list(STATE) and all(torch.equal(state[name], STATE[name]) for name in STATE)


def rewritten(checkpoint: Checkpoint) -> tuple[Any, tuple[str, ...]]:
    """What is in the file that is written of it, and what is said of that."""
    saved = save(checkpoint, checkpoint.module, checkpoint.path.with_name("out.pt"), force=True)
    return torch.load(saved.path, weights_only=False), saved.notes


@pytest.mark.parametrize("key", KEYS)
def test_every_usual_key_is_found(key: str, tmp_path: Path) -> None:
    checkpoint = opened({"epoch": 3, key: STATE, "loss": 0.5}, tmp_path)
    assert same_weights(checkpoint)
    assert checkpoint.notes == ()
    assert list(rewritten(checkpoint)[0]) == ["epoch", key, "loss"]


def test_a_bare_state_dict_stands_alone(tmp_path: Path) -> None:
    checkpoint = opened(dict(STATE), tmp_path)
    assert same_weights(checkpoint)
    assert same_weights(rewritten(checkpoint)[0])


def test_the_averaged_weights_come_first_and_this_is_said(tmp_path: Path) -> None:
    other = OrderedDict((name, tensor + 1) for name, tensor in STATE.items())
    checkpoint = opened({"state_dict": other, "state_dict_ema": STATE}, tmp_path)
    assert same_weights(checkpoint)
    assert "state_dict_ema" in checkpoint.notes[0]
    assert "'state_dict'" in checkpoint.notes[0]
    chosen = opened({"state_dict": other, "state_dict_ema": STATE}, tmp_path, weights="state_dict")
    assert not same_weights(chosen)


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_average_is_passed_over(empty: Any, tmp_path: Path) -> None:
    written, _ = rewritten(opened({"ema": empty, "model": STATE}, tmp_path))
    assert written["ema"] == empty and same_weights(written["model"])


def test_one_dictionary_inside_another(tmp_path: Path) -> None:
    checkpoint = opened({"ema": {"module": STATE, "updates": 7}, "epoch": 1}, tmp_path)
    assert same_weights(checkpoint)
    written, _ = rewritten(checkpoint)
    assert same_weights(written["ema"].pop("module"))
    assert written == {"epoch": 1, "ema": {"updates": 7}}


def test_a_key_that_the_user_names_is_the_only_one_looked_at(tmp_path: Path) -> None:
    assert same_weights(opened({"generator": STATE, "model": {"a": 1}}, tmp_path, weights="generator"))
    with pytest.raises(RepfuseError, match="under 'discriminator'"):
        opened({"generator": STATE}, tmp_path, weights="discriminator")


def test_what_goes_stale_or_is_no_plain_data_is_left_out(tmp_path: Path) -> None:
    container = {
        "epoch": 3,
        "best": {"accuracy": [0.5, (1, "a")], "mean": torch.ones(3)},
        "optimizer_state_dict": {"state": {}},
        "lr_scheduler": {"last_epoch": 3},
        "scaler": None,
        "state_dict": STATE,
        "state_dict_ema": STATE,
        "args": Namespace(lr=1),
        "sampler": print,
    }
    written, notes = rewritten(opened(container, tmp_path))
    assert set(written) == {"epoch", "best", "scaler", "state_dict_ema", "args"}
    assert [note for note in notes if note.startswith("left out")] == [
        "left out of the training checkpoint: optimizer_state_dict, lr_scheduler "
        "(it belongs to the training and no longer fits)",
        "left out of the training checkpoint: state_dict (another copy of the weights)",
        "left out of the training checkpoint: sampler "
        "(it holds the class or function builtins.print, which is no plain data)",
    ]


def test_copies_go_and_other_networks_stay(tmp_path: Path) -> None:
    other = {"conv1.weight": torch.ones(1), "0.weight": torch.ones(1)}  # one name in common
    copy = OrderedDict((f"module.{name}", tensor) for name, tensor in STATE.items())
    container = {"state_dict": STATE, "discriminator": other, "callbacks": {"swa": {"average": copy}}}
    written, notes = rewritten(opened(container, tmp_path))
    assert set(written) == {"state_dict", "discriminator"} and written["discriminator"] == other
    assert "left out of the training checkpoint: callbacks (another copy of the weights)" in notes


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key not in KEYS), PLAIN), st.sampled_from(KEYS))
def test_what_is_around_the_network_comes_back(folder: Path, container: dict[str, Any], key: str) -> None:
    checkpoint = opened(container | {key: STATE}, folder)
    written, _ = rewritten(checkpoint)
    assert same_weights(written.pop(key))
    assert all(written[name] == container[name] for name in written)
    assert set(written) | set(checkpoint.around.left_out) == set(container)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"epoch": 3, "loss": 0.5}, "epoch, loss"),
        ({}, "none"),
        (torch.ones(3), "Tensor"),
        ([STATE], "list"),
        ({"state_dict": {"weight": [1.0, 2.0]}}, "state_dict"),
        ({"model": 3}, "model"),
        ({3: torch.ones(3)}, "3"),
    ],
)
def test_a_file_without_a_network_is_an_error_that_says_what_it_holds(tree: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="holds no network") as error:
        opened(tree, tmp_path)
    assert said in error.value.why


@pytest.mark.parametrize(("name", "value"), [("_parameters", [1]), ("_buffers", 3), ("_non_persistent_buffers_set", 5)])
def test_a_network_whose_tables_are_none_is_no_error_of_python(name: str, value: Any, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    vars(network[0])[name] = value
    torch.save({"model": network, "epoch": 3}, tmp_path / "in.pt")
    for model in (None, "timm:resnet18"):
        with pytest.raises(RepfuseError) if name != "_non_persistent_buffers_set" else nullcontext():
            load(tmp_path / "in.pt", model=model, input="1x3x4x4")
