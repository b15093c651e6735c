"""Example inputs: the text form, what networks know, and the guess."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repfuse.checkpoint.build import (
    guessed_shape,
    known_shape,
    make_inputs,
    shapes_of,
)
from repfuse.checkpoint.spec import DTYPES as KNOWN_DTYPES
from repfuse.checkpoint.spec import Shape, parse_shapes, render
from repfuse.errors import RepfuseError
from repfuse.samples import DigitsRepVGG

DTYPES = (None, "float32", "float16", "bfloat16", "float64", "int64", "bool")
SHAPES = st.builds(Shape, st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple), st.sampled_from(DTYPES))


@given(st.lists(SHAPES, min_size=1, max_size=3).map(tuple))
def test_what_is_rendered_parses_to_the_same(shapes: tuple[Shape, ...]) -> None:
    assert parse_shapes(render(shapes)) == shapes


@given(st.lists(SHAPES, min_size=1, max_size=3).map(tuple))
def test_inputs_have_the_shapes_asked_for(shapes: tuple[Shape, ...]) -> None:
    network = nn.Linear(1, 1)
    inputs = make_inputs(shapes, network)
    assert [tuple(x.shape) for x in inputs] == [shape.sizes for shape in shapes]
    assert [x.dtype for x in inputs] == [getattr(torch, shape.dtype or "float32") for shape in shapes]
    again = make_inputs(shapes_of(inputs, network), network)
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
        "1x3:",
        "1x3,",
        "1,3,224,224",
        "1x3x224x224;",
        "a",
    ],
)
def test_other_texts_are_refused_with_the_form(text: str) -> None:
    with pytest.raises(RepfuseError) as error:
        parse_shapes(text)
    assert error.value.exit_code == 2
    assert error.value.hint


def test_torch_is_allowed_before_the_dtype_and_spaces_after_commas() -> None:
    assert parse_shapes("1x3:torch.float16, 2:int64") == (Shape((1, 3), "float16"), Shape((2,), "int64"))


def test_an_input_too_large_for_the_memory_is_an_error() -> None:
    with pytest.raises(RepfuseError, match="cannot be made"):
        make_inputs(parse_shapes("999999999x999999999"), nn.ReLU())


def test_inputs_follow_the_dtype_of_the_network_and_never_change() -> None:
    network = nn.Linear(2, 2, dtype=torch.bfloat16)
    first, again = make_inputs([Shape((1, 2))], network), make_inputs([Shape((1, 2))], network)
    assert first[0].dtype == torch.bfloat16
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(5, 1, 1), nn.Conv2d(1, 1, 1)), (1, 5, 224, 224)),
        (nn.Conv1d(6, 1, 1), (1, 6, 224)),
        (nn.Conv3d(2, 1, 1), (1, 2, 32, 32, 32)),
        (nn.Sequential(nn.Linear(7, 1)), (1, 7)),
    ],
)
def test_the_guess_follows_the_first_layer(network: nn.Module, sizes: tuple[int, ...]) -> None:
    assert guessed_shape(network) == Shape(sizes)
    assert known_shape(network, {}) is None


def test_no_guess_without_a_layer_to_guess_from() -> None:
    with pytest.raises(RepfuseError, match="--input"):
        guessed_shape(nn.ReLU())


def test_an_attribute_of_an_unknown_class_is_not_taken_for_knowledge() -> None:
    network = nn.Conv2d(3, 3, 1)
    network.input_shape = (32, 32, 3)
    network.pretrained_cfg = {"input_size": (3, 9, 9)}
    assert known_shape(network, {}) is None


def test_the_samples_know_their_input() -> None:
    assert known_shape(DigitsRepVGG(), {}) == Shape((1, 1, 8, 8))


@pytest.mark.parametrize(
    ("name", "arguments", "sizes"),
    [
        ("resnet18", {}, (1, 3, 224, 224)),
        ("resnet18", {"in_chans": 1}, (1, 1, 224, 224)),
        ("resnet18", {"in_chans": 6}, (1, 6, 224, 224)),
        ("tresnet_m", {}, (1, 3, 224, 224)),  # its first convolution reads 48 channels: 4x4 pixels each
    ],
)
def test_timm_knows_its_input(name: str, arguments: dict[str, int], sizes: tuple[int, ...]) -> None:
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, **arguments)
    assert known_shape(network, arguments) == Shape(sizes)
    if arguments != {"in_chans": 6}:
        assert known_shape(network, {}) == Shape(sizes)


def test_every_dtype_that_is_known_is_one_of_torch() -> None:
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in KNOWN_DTYPES)
