"""Names in the file and names in the network: prefixes, wrappers inside names, entries beside the network."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.agreement import randomised
from torch import Tensor, nn

from repfuse import Plan, RepfuseError, fuse, load, save
from repfuse.loading import Checkpoint


class Noting(nn.BatchNorm2d):
    """Notes which version of it the file says that it holds."""

    noted: Any = None

    def _load_from_state_dict(self, state: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        self.noted = local_metadata.get("version")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


class Net(nn.Module):
    """A stem that is folded, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), Noting(2))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu().mean((2, 3)))


def calling_a_child_module() -> nn.Module:
    return nn.ModuleDict({"module": Net()})


def compiling_a_child() -> nn.Module:
    return nn.ModuleDict({"net": torch.compile(Net())})


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    return network


STATE = randomised(Net(), dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names")


def prefixed(prefix: str, state: Any = STATE) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def opened(data: Any, folder: Path, model: str = "Net", **options: Any) -> Checkpoint:
    torch.save(data, folder / "in.pt")
    return load(folder / "in.pt", model=f"{__name__}:{model}", input="1x2x4x4", **options)


def refused(data: Any, folder: Path, said: str, **options: Any) -> RepfuseError:
    with pytest.raises(RepfuseError, match=said) as error:
        opened(data, folder, **options)
    return error.value


def rewritten(
    checkpoint: Checkpoint, network: nn.Module | None = None, plan: Plan | None = None
) -> OrderedDict[str, Tensor]:
    """The state dict that is written of the network as it is, or as the plan made it."""
    out = checkpoint.path.with_name("out.pt")
    save(checkpoint, network or checkpoint.module, out, plan=plan, format="state-dict", force=True)
    return torch.load(out, weights_only=True)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def is_round(checkpoint: Checkpoint, state: dict[str, Tensor]) -> bool:
    """Every weight is found, and everything comes back under the name that it had."""
    return same(checkpoint.module.state_dict(), STATE) and same(rewritten(checkpoint), state)


def off(prefix: str) -> str:
    return f"took the prefix {prefix!r} off the names of the weights"


SEGMENTS = ["module", "_orig_mod", "model", "net", "backbone"]


@given(st.lists(st.sampled_from(SEGMENTS), max_size=4))
def test_any_prefix_comes_off_and_goes_back_on(folder: Path, segments: list[str]) -> None:
    prefix = "".join(f"{segment}." for segment in segments)
    checkpoint = opened(prefixed(prefix), folder)
    assert checkpoint.notes == ((off(prefix),) if segments else ())
    assert is_round(checkpoint, prefixed(prefix))


def wrapped_name(name: str, before: list[str], stem: list[str], conv: list[str]) -> str:
    """The network, its stem and its stem's convolution are wrapped on their own."""
    first, *rest = name.split(".")
    inner = [rest[0], *conv, *rest[1:]] if (first, rest[0]) == ("stem", "0") else rest
    return ".".join([*before, first, *(stem if first == "stem" else ()), *inner])


@given(
    st.lists(st.sampled_from(SEGMENTS), max_size=3),
    st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=2),
    st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=2),
)
def test_wrappers_inside_names_come_out_and_go_back_in(
    folder: Path, before: list[str], stem: list[str], conv: list[str]
) -> None:
    state = {wrapped_name(name, before, stem, conv): tensor for name, tensor in STATE.items()}
    assert is_round(opened(state, folder), state)


@pytest.mark.parametrize(
    "wrappers",
    [
        ([], [], []),
        (["net"], ["_orig_mod"], []),
        (["net"], [], ["module", "_orig_mod"]),
        (["module", "_orig_mod"], ["module"], ["_orig_mod"]),
    ],
)
def test_a_name_that_is_new_is_wrapped_as_those_beside_it(folder: Path, wrappers: tuple[list[str], ...]) -> None:
    checkpoint = opened({wrapped_name(name, *wrappers): tensor for name, tensor in STATE.items()}, folder)
    result = fuse(checkpoint.module, checkpoint.example_inputs)
    fused = result.module.state_dict()
    assert "stem.0.bias" in fused.keys() - STATE.keys()
    expected = {wrapped_name(name, *wrappers): tensor for name, tensor in fused.items()}
    assert same(rewritten(checkpoint, result.module, result.plan), expected)


def test_real_wrappers_in_any_order(tmp_path: Path) -> None:
    inner = randomised(Net(), dtype=torch.float32)
    inner.stem = torch.compile(inner.stem)
    wrapped = torch.optim.swa_utils.AveragedModel(nn.DataParallel(torch.compile(inner)))
    checkpoint = opened(wrapped.state_dict(), tmp_path)
    assert is_round(checkpoint, wrapped.state_dict())
    assert checkpoint.module.stem[1].noted == 2
    assert checkpoint.notes[-1].endswith(": n_averaged")
    wrapped.load_state_dict(rewritten(checkpoint), strict=True)


@pytest.mark.parametrize("own", [calling_a_child_module, compiling_a_child])
def test_names_that_fit_as_they_are_are_left_alone(own: Any, tmp_path: Path) -> None:
    """A network may call a child of its own `module`, or compile one: those are no wrappers."""
    state = own().state_dict()
    for prefix, notes in (("", ()), ("module.", (off("module."),))):
        checkpoint = opened(prefixed(prefix, state), tmp_path, own.__name__)
        assert checkpoint.notes == notes
        assert same(checkpoint.module.state_dict(), state)
        assert same(rewritten(checkpoint), prefixed(prefix, state))


def test_what_is_outside_the_prefix_is_said_and_comes_back(tmp_path: Path) -> None:
    state = prefixed("model.") | {"criterion.weight": torch.ones(3), "metric.total": torch.ones(1)}
    checkpoint = opened(state, tmp_path)
    assert checkpoint.notes[1].endswith("outside 'model.': criterion.weight, metric.total")
    assert is_round(checkpoint, state)


def test_what_does_not_fit_exactly_is_told_of_the_nearest_reading(tmp_path: Path) -> None:
    state = prefixed("model.")
    state["model.head.weight"] = torch.ones(7, 2)
    why = "1 of another shape: head.weight (7x2 in the file, 3x2 in the network)"
    assert refused(state, tmp_path, "do not fit").why == why
    state["model.head.weight"] = STATE["head.weight"]
    del state["model.stem.0.weight"]
    state["model.stem.0.more"] = torch.ones(1)
    why = "1 missing from the file: stem.0.weight\n1 unexpected in the file: stem.0.more"
    assert refused(state, tmp_path, "do not fit").why == why


def test_of_two_networks_that_fit_none_is_guessed(tmp_path: Path) -> None:
    state = prefixed("student.") | prefixed("teacher.")
    error = refused({"state_dict": state}, tmp_path, "several networks")
    assert "--weights state_dict.student or --weights state_dict.teacher" in error.hint
    checkpoint = opened(state, tmp_path, weights="teacher")
    assert checkpoint.notes == (off("teacher."), "left out other copies of the weights: 'student.'")
    assert is_round(checkpoint, prefixed("teacher."))  # a copy that is not fused would not fit any more


def test_a_network_of_other_shapes_or_a_missing_tie_is_told_apart(tmp_path: Path) -> None:
    state = prefixed("student.") | prefixed("teacher.")
    state["student.head.weight"] = torch.ones(7, 2)
    checkpoint = opened(state, tmp_path)
    assert checkpoint.notes[0] == off("teacher.")
    assert is_round(checkpoint, state)  # another network, and no copy
    both = prefixed("a.", tied().state_dict()) | prefixed("b.", tied().state_dict())
    del both["a.0.weight"]
    refused(both, tmp_path, "several networks", model="tied")


def test_a_prefix_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    state = prefixed("model.") | {"teacher.loss": torch.ones(1)}
    error = refused(state, tmp_path, "no weights for names that begin with 'teacher.'", weights="teacher")
    assert "'model.'" in error.why
    assert "--weights model" in error.hint


@pytest.mark.parametrize("prefix", ["ema.", "model_ema.module.", "averaged_model."])
def test_an_average_beside_the_trained_weights_is_chosen_by_kind(prefix: str, tmp_path: Path) -> None:
    state = prefixed("model.") | prefixed(prefix, {name: tensor + 1 for name, tensor in STATE.items()})
    averaged = opened(state, tmp_path, weights="ema")
    assert averaged.notes[0] == off(prefix)
    assert torch.equal(averaged.module.head.weight, STATE["head.weight"] + 1)
    trained = opened(state, tmp_path, weights="model")
    assert trained.notes[0] == off("model.")
    assert torch.equal(trained.module.head.weight, STATE["head.weight"])


def test_averaged_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    for state in (STATE, prefixed("model."), prefixed("schema."), {"other": torch.ones(1)}):
        refused(state, tmp_path, "no weights for --weights ema", weights="ema")
    counted = prefixed("module.") | {"n_averaged": torch.tensor(3)}
    assert is_round(opened(counted, tmp_path, weights="ema"), counted)
    refused(counted, tmp_path, "no weights for --weights model", weights="model")


def test_a_tied_weight_may_be_missing_under_a_prefix(tmp_path: Path) -> None:
    state = prefixed("model.", tied().state_dict())
    del state["model.0.weight"]
    checkpoint = opened(state, tmp_path, "tied")
    assert checkpoint.notes[0] == off("model.")
    assert torch.equal(checkpoint.module[0].weight, state["model.1.weight"])


def test_a_module_wrapped_in_part_is_not_wrapped(tmp_path: Path) -> None:
    state = OrderedDict(STATE)
    state["head._orig_mod.weight"] = state.pop("head.weight")
    error = refused(state, tmp_path, "do not fit")
    assert error.why == "1 missing from the file: head.weight\n1 unexpected in the file: head._orig_mod.weight"
    state["head._orig_mod.bias"] = state.pop("head.bias")
    assert is_round(opened(state, tmp_path), state)


@pytest.mark.parametrize("name", ["_orig_mod.module.x", "stem.0.weight"])
def test_a_file_of_very_many_names_takes_no_time(name: str, tmp_path: Path) -> None:
    """Seconds where every name is compared with some others, hours where it is with all."""
    state = dict.fromkeys((f"a{i}.{name}" for i in range(10_000)), torch.ones(0))
    started = time.process_time()
    refused(state, tmp_path, "do not fit")
    assert time.process_time() - started < 20
