"""Example inputs: the text form, what networks know, and the guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repfuse import RepfuseError, load, save
from repfuse.loading import Checkpoint
from repfuse.samples import DigitsRepVGG

DTYPES = (None, "float32", "float16", "bfloat16", "float64", "int64", "bool")
SHAPES = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=3,
)
KNOWN = (
    *("float64", "double", "float32", "float", "float16", "half", "bfloat16", "complex32", "complex64", "complex128"),
    *("int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "bool"),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights, which says nothing of inputs."""
    path = tmp_path_factory.mktemp("linear") / "linear.pt"
    torch.save(nn.Linear(1, 1).state_dict(), path)
    return path


def linear(weights: Path, text: str) -> Checkpoint:
    return load(weights, model="torch.nn:Linear", model_args=["in_features=1", "out_features=1"], input=text)


def held(network: nn.Module, folder: Path, **options: Any) -> Checkpoint:
    torch.save(network, folder / "network.pt")
    return load(folder / "network.pt", **options)


def written(shapes: list[tuple[tuple[int, ...], str | None]]) -> str:
    return ",".join("x".join(map(str, sizes)) + (f":{dtype}" if dtype else "") for sizes, dtype in shapes)


@given(SHAPES)
def test_what_a_written_file_says_of_its_inputs_makes_the_same(
    weights: Path, shapes: list[tuple[tuple[int, ...], str | None]]
) -> None:
    checkpoint = linear(weights, written(shapes))
    again = load(save(checkpoint, checkpoint.module, weights.with_name("again.pt"), force=True).path, trust=True)
    assert again.input_origin == "checkpoint"
    pairs = list(zip(again.example_inputs, checkpoint.example_inputs, strict=True))
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


@given(SHAPES)
def test_inputs_have_the_shapes_asked_for(weights: Path, shapes: list[tuple[tuple[int, ...], str | None]]) -> None:
    inputs = linear(weights, written(shapes)).example_inputs
    assert [tuple(x.shape) for x in inputs] == [sizes for sizes, _ in shapes]
    assert [x.dtype for x in inputs] == [getattr(torch, dtype or "float32") for _, dtype in shapes]
    again = linear(weights, written(shapes)).example_inputs
    assert all(torch.equal(one, other) for one, other in zip(inputs, again, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1x",
        "0x3",
        "-1x3",
        "1x3x2.5",
        "1 x 3",
        "1x3:f",
        "1x3:nn",
        "1x3:float80",
        "1x3:",
        "1x3,",
        "1,3,224,224",
        "1x3x224x224;",
        "a",
    ],
)
def test_other_texts_are_refused_with_the_form(weights: Path, text: str) -> None:
    with pytest.raises(RepfuseError) as error:
        linear(weights, text)
    assert error.value.exit_code == 2
    assert error.value.hint


def test_torch_is_allowed_before_the_dtype_and_spaces_after_commas(weights: Path) -> None:
    inputs = linear(weights, "1x3:torch.float16, 2:int64").example_inputs
    assert [(tuple(x.shape), x.dtype) for x in inputs] == [((1, 3), torch.float16), ((2,), torch.int64)]


def test_an_input_too_large_for_the_memory_is_an_error(weights: Path) -> None:
    with pytest.raises(RepfuseError, match="cannot be made"):
        linear(weights, "999999999x999999999")


def test_inputs_follow_the_dtype_of_the_network_and_never_change(tmp_path: Path) -> None:
    network = nn.Linear(2, 2, dtype=torch.bfloat16)
    (first,), (again,) = (held(network, tmp_path, input="1x2").example_inputs for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(5, 1, 1), nn.Conv2d(1, 1, 1)), (1, 5, 224, 224)),
        (nn.Conv1d(6, 1, 1), (1, 6, 224)),
        (nn.Conv3d(2, 1, 1), (1, 2, 32, 32, 32)),
        (nn.Sequential(nn.Linear(7, 1)), (1, 7)),
    ],
)
def test_the_guess_follows_the_first_layer(network: nn.Module, sizes: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = held(network, tmp_path)
    assert ([x.shape for x in checkpoint.example_inputs], checkpoint.input_origin) == ([sizes], "guess")


def test_no_guess_without_a_layer_to_guess_from(tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="--input"):
        held(nn.ReLU(), tmp_path)


def test_an_attribute_of_an_unknown_class_is_not_taken_for_knowledge(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 3, 1)
    network.input_shape = (32, 32, 3)
    network.pretrained_cfg = {"input_size": (3, 9, 9)}
    checkpoint = held(network, tmp_path)
    assert ([x.shape for x in checkpoint.example_inputs], checkpoint.input_origin) == ([(1, 3, 224, 224)], "guess")


def test_the_samples_know_their_input(tmp_path: Path) -> None:
    checkpoint = held(DigitsRepVGG(), tmp_path)
    assert ([x.shape for x in checkpoint.example_inputs], checkpoint.input_origin) == ([(1, 1, 8, 8)], "checkpoint")


@pytest.mark.parametrize(
    ("name", "arguments", "sizes"),
    [
        ("resnet18", {}, (1, 3, 224, 224)),
        ("resnet18", {"in_chans": 1}, (1, 1, 224, 224)),
        ("resnet18", {"in_chans": 6}, (1, 6, 224, 224)),
        ("tresnet_m", {}, (1, 3, 224, 224)),  # its first convolution reads 48 channels: 4x4 pixels each
    ],
)
def test_timm_knows_its_input(name: str, arguments: dict[str, int], sizes: tuple[int, ...], tmp_path: Path) -> None:
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, **arguments)
    torch.save(network.state_dict(), tmp_path / "x.pt")
    built = load(tmp_path / "x.pt", model=f"timm:{name}", model_args=arguments, device="meta")
    assert ([x.shape for x in built.example_inputs], built.input_origin) == ([sizes], "model source")
    if arguments == {"in_chans": 1}:  # without the arguments that it was built with
        assert [x.shape for x in held(network, tmp_path, device="meta").example_inputs] == [sizes]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", KNOWN)
def test_every_dtype_that_is_known_is_one_of_torch(weights: Path, name: str) -> None:
    (found,) = linear(weights, f"2x3:{name}").example_inputs
    assert found.dtype is getattr(torch, name)
