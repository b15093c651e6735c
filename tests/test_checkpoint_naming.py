"""Names in the file and names in the network: prefixes, wrappers inside names, entries beside the network."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repfuse.checkpoint.weights import BARE, ChosenWeights, Naming, fit, wrapped_in
from repfuse.errors import RepfuseError


def network() -> nn.Module:
    return nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), "head": nn.Linear(2, 3)})


STATE = network().state_dict()
ABOUT = "x.pt holds"


def prefixed(prefix: str, state: Any = STATE) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def fitted(state: dict[str, Any], chosen: ChosenWeights = BARE) -> Naming:
    return fit(state, network(), chosen, ABOUT)


def is_round(naming: Naming, state: dict[str, Any]) -> bool:
    """Every weight is found, and everything comes back under the name that it had."""
    found = naming.of_network(state)
    back = naming.of_file(found)
    same = all(found[name] is STATE[name] for name in STATE)
    return (
        same
        and found.keys() == STATE.keys()
        and {k: id(v) for k, v in back.items()} == {k: id(v) for k, v in state.items()}
    )


SEGMENTS = ["module", "_orig_mod", "model", "net", "backbone"]


@given(st.lists(st.sampled_from(SEGMENTS), max_size=4))
def test_any_prefix_comes_off_and_goes_back_on(segments: list[str]) -> None:
    state = prefixed("".join(f"{segment}." for segment in segments))
    naming = fitted(state)
    assert naming.in_file("") == "".join(f"{segment}." for segment in segments)
    assert is_round(naming, state)
    assert bool(naming.notes()) == bool(segments)


@given(
    st.lists(st.sampled_from(SEGMENTS), max_size=3),
    st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=2),
    st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=2),
)
def test_wrappers_inside_names_come_out_and_go_back_in(before: list[str], stem: list[str], conv: list[str]) -> None:
    """The network, its stem and its stem's convolution are wrapped on their own."""

    def rename(name: str) -> str:
        first, *rest = name.split(".")
        inner = [rest[0], *conv, *rest[1:]] if (first, rest[0]) == ("stem", "0") else rest
        return ".".join([*before, first, *(stem if first == "stem" else ()), *inner])

    state = OrderedDict((rename(name), tensor) for name, tensor in STATE.items())
    naming = fitted(state)
    assert is_round(naming, state)
    assert naming.of_file({"stem.0.new": 1}).keys() - naming.extras.keys() == {rename("stem.0.new")}


def test_real_wrappers_in_any_order() -> None:
    inner = network()
    inner["stem"] = torch.compile(inner["stem"])
    wrapped = torch.optim.swa_utils.AveragedModel(nn.DataParallel(torch.compile(inner)))
    naming = fit(wrapped.state_dict(), network(), BARE, ABOUT)
    found = naming.of_network(wrapped.state_dict())
    network().load_state_dict(found, strict=True)
    assert found._metadata.keys() == STATE._metadata.keys()
    assert naming.extras.keys() == {"n_averaged"}
    back = naming.of_file(found)
    assert back.keys() == wrapped.state_dict().keys()
    wrapped.load_state_dict(back, strict=True)


def test_names_that_fit_as_they_are_are_left_alone() -> None:
    """A network may call a child of its own `module`, or compile one: those are no wrappers."""
    for own in (nn.ModuleDict({"module": network()}), nn.ModuleDict({"net": torch.compile(network())})):
        naming = fit(own.state_dict(), own, BARE, ABOUT)
        assert naming == Naming()
        naming = fit(prefixed("module.", own.state_dict()), own, BARE, ABOUT)
        assert (naming.in_file(""), naming.extras) == ("module.", {})


def test_what_is_outside_the_prefix_is_said_and_comes_back() -> None:
    state = prefixed("model.") | {"criterion.weight": torch.ones(3), "metric.total": torch.ones(1)}
    naming = fitted(state)
    assert naming.extras.keys() == {"criterion.weight", "metric.total"}
    assert "criterion.weight, metric.total" in naming.notes()[1]
    assert is_round(naming, state)


def test_what_does_not_fit_exactly_is_told_of_the_nearest_reading() -> None:
    state = prefixed("model.")
    state["model.head.weight"] = torch.ones(7, 2)
    assert fitted(state).in_file("") == "model."
    del state["model.stem.0.bias"]
    state["model.stem.0.more"] = torch.ones(1)
    found = fitted(state).of_network(state)
    assert found.keys() ^ STATE.keys() == {"stem.0.bias", "stem.0.more"}


def test_of_two_networks_that_fit_none_is_guessed() -> None:
    state = prefixed("student.") | prefixed("teacher.")
    with pytest.raises(RepfuseError, match="several networks") as error:
        fitted(state, ChosenWeights(("state_dict",)))
    assert "--weights state_dict.student or --weights state_dict.teacher" in error.value.hint
    naming = fitted(state, ChosenWeights((), "teacher."))
    assert naming.in_file("") == "teacher."
    assert naming.copies == ("student.",)
    assert not naming.extras  # a copy that is not fused would not fit any more
    assert "student." in naming.notes()[-1]


def test_a_network_of_other_shapes_or_a_missing_tie_is_told_apart() -> None:
    state = prefixed("student.") | prefixed("teacher.")
    state["student.head.weight"] = torch.ones(7, 2)
    naming = fitted(state)
    assert naming.in_file("") == "teacher."
    assert naming.extras.keys() == prefixed("student.").keys()  # another network, and no copy
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    both = prefixed("a.", tied.state_dict()) | prefixed("b.", tied.state_dict())
    del both["a.0.weight"]
    with pytest.raises(RepfuseError, match="several networks"):
        fit(both, tied, BARE, ABOUT)


def test_a_prefix_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(RepfuseError, match="no weights for names") as error:
        fitted(prefixed("model.") | {"ema.loss": torch.ones(1)}, ChosenWeights((), "ema."))
    assert "'model.'" in error.value.why
    assert "--weights model" in error.value.hint


@pytest.mark.parametrize("prefix", ["ema.", "model_ema.module.", "averaged_model."])
def test_an_average_beside_the_trained_weights_is_chosen_by_kind(prefix: str) -> None:
    state = prefixed("model.") | prefixed(prefix)
    assert fitted(state, ChosenWeights((), kind="ema")).in_file("") == prefix
    assert fitted(state, ChosenWeights((), kind="model")).in_file("") == "model."


def test_averaged_weights_that_are_not_there_are_not_made_up() -> None:
    for state in (STATE, prefixed("model."), prefixed("schema."), {"other": torch.ones(1)}):
        with pytest.raises(RepfuseError, match="no weights for --weights ema"):
            fitted(state, ChosenWeights((), kind="ema"))
    counted = prefixed("module.") | {"n_averaged": torch.tensor(3)}
    assert fitted(counted, ChosenWeights((), kind="ema")).extras.keys() == {"n_averaged"}
    with pytest.raises(RepfuseError, match="no weights for --weights model"):
        fitted(counted, ChosenWeights((), kind="model"))


def test_a_tied_weight_may_be_missing_under_a_prefix() -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    state = prefixed("model.", tied.state_dict())
    del state["model.0.weight"]
    assert fit(state, tied, BARE, ABOUT).in_file("") == "model."


def test_a_module_wrapped_in_part_is_not_wrapped() -> None:
    assert wrapped_in(["a._orig_mod.x", "a.y"], ["_orig_mod"]) is None
    assert wrapped_in(["a._orig_mod.x", "b.y"], ["_orig_mod"]) == {"a": "_orig_mod."}


@pytest.mark.parametrize("name", ["_orig_mod.module.x", "stem.0.weight"])
def test_a_file_of_very_many_names_takes_no_time(name: str) -> None:
    """Seconds where every name is compared with some others, hours where it is with all."""
    state = {f"a{i}.{name}": torch.ones(0) for i in range(10_000)}
    started = time.process_time()
    fitted(state)
    assert time.process_time() - started < 20
