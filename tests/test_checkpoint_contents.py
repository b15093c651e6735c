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
from torch import nn

import repfuse
from repfuse.checkpoint.contents import KEYS, Contents, find
from repfuse.errors import RepfuseError

PATH = Path("x.pt")
STATE = OrderedDict(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).state_dict())


def same_weights(contents: Contents) -> bool:
    found = contents.state
    return found is not None and list(found) == list(STATE) and all(found[name] is STATE[name] for name in STATE)


@pytest.mark.parametrize("key", KEYS)
def test_every_usual_key_is_found(key: str) -> None:
    contents = find({"epoch": 3, key: STATE}, PATH)
    assert same_weights(contents)
    assert contents.around.keys == (key,)
    assert not contents.notes


def test_a_bare_state_dict_stands_alone() -> None:
    contents = find(dict(STATE), PATH)
    assert same_weights(contents)
    assert contents.around.put("network") == "network"


def test_the_averaged_weights_come_first_and_this_is_said() -> None:
    other = OrderedDict((name, tensor + 1) for name, tensor in STATE.items())
    contents = find({"state_dict": other, "state_dict_ema": STATE}, PATH)
    assert same_weights(contents)
    assert "state_dict_ema" in contents.notes[0]
    assert "'state_dict'" in contents.notes[0]
    chosen = find({"state_dict": other, "state_dict_ema": STATE}, PATH, weights="state_dict")
    assert not same_weights(chosen)


def test_an_empty_average_is_passed_over() -> None:
    for empty in (None, {}):
        assert find({"ema": empty, "model": STATE}, PATH).around.keys == ("model",)


def test_one_dictionary_inside_another() -> None:
    contents = find({"ema": {"module": STATE, "updates": 7}, "epoch": 1}, PATH)
    assert same_weights(contents)
    assert contents.around.put("new") == {"epoch": 1, "ema": {"module": "new", "updates": 7}}


def test_a_key_that_the_user_names_is_the_only_one_looked_at() -> None:
    assert same_weights(find({"generator": STATE, "model": {"a": 1}}, PATH, weights="generator"))
    with pytest.raises(RepfuseError, match="under 'discriminator'"):
        find({"generator": STATE}, PATH, weights="discriminator")


def test_what_goes_stale_or_is_no_plain_data_is_left_out() -> None:
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
    layout = find(container, PATH).around
    assert set(layout.put("network")) == {"epoch", "best", "scaler", "state_dict_ema", "args"}
    assert set(layout.left_out) == {"optimizer_state_dict", "lr_scheduler", "state_dict", "sampler"}


def test_copies_go_and_other_networks_stay() -> None:
    other = {"conv1.weight": torch.ones(1), "0.weight": torch.ones(1)}  # one name in common
    copy = OrderedDict((f"module.{name}", tensor) for name, tensor in STATE.items())
    container = {"state_dict": STATE, "discriminator": other, "callbacks": {"swa": {"average": copy}}}
    layout = find(container, PATH).around
    assert layout.kept() == ["discriminator"]
    assert layout.left_out == {"callbacks": "another copy of the weights"}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key not in KEYS), PLAIN), st.sampled_from(KEYS))
def test_take_is_the_inverse_of_put(container: dict[str, Any], key: str) -> None:
    layout = find(container | {key: STATE}, PATH).around
    written = layout.put("network")
    assert layout.take(written) == "network"
    assert all(written[name] == container[name] for name in written if name != key)
    assert set(written) | set(layout.left_out) == set(container) | {key}


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
def test_a_file_without_a_network_is_an_error_that_says_what_it_holds(tree: Any, said: str) -> None:
    with pytest.raises(RepfuseError, match="holds no network") as error:
        find(tree, PATH)
    assert said in error.value.why


@pytest.mark.parametrize(("name", "value"), [("_parameters", [1]), ("_buffers", 3), ("_non_persistent_buffers_set", 5)])
def test_a_network_whose_tables_are_none_is_no_error_of_python(name: str, value: Any, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    vars(network[0])[name] = value
    torch.save({"model": network, "epoch": 3}, tmp_path / "in.pt")
    for model in (None, "timm:resnet18"):
        with pytest.raises(RepfuseError) if name != "_non_persistent_buffers_set" else nullcontext():
            repfuse.load(tmp_path / "in.pt", model=model, input="1x3x4x4")
