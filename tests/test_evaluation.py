"""The laws of expressions: evaluated, they are what torch computes layer by layer; and what is said of them holds."""

from __future__ import annotations

import pytest
import torch
from blocks import Spelled
from blocks import conv as conv_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import error, image, randomised
from support.expressions import CHANNELS, Tensors, expressions, run, square
from support.maps import same
from torch import nn
from torch.nn import functional as F

from repfuse.algebra.evaluation import behind_norm, check_borders, constant, evaluate
from repfuse.algebra.expression import (
    Identity,
    Scaled,
    Sum,
    Through,
    channels_read,
    homogeneous,
    joined,
    multiple_of_source,
    of_channels_alone,
    of_channels_read,
    selected,
    sum_of,
    through,
)
from repfuse.algebra.geometry import Geometry, NotAffine
from repfuse.algebra.layers import Convolution, Factor, Filter, Normalisation, Offset, Phases
from repfuse.fusing import fuse
from repfuse.plans import Policy

CPU = torch.device("cpu")
LIKE = torch.empty(0, dtype=torch.float64)
SETTINGS = settings(deadline=None, max_examples=min(150, 3 * settings().max_examples))
SOURCE = Identity(CHANNELS, 2)
IMAGE = torch.randn(2, CHANNELS, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NORM = Normalisation("mean", "var", "weight", "bias", 0.5)


def conv(inputs=CHANNELS, outputs=6, kernel=3, groups=1, weight="w", bias=None) -> Convolution:
    return Convolution(square(inputs, outputs, kernel, groups), weight, bias)


def pool(channels=CHANNELS, kernel=3, fill=0.0) -> Filter:
    return Filter(square(channels, channels, kernel, channels), 1 / kernel**2, fill)


def linear(inputs, outputs, weight, bias=None) -> Convolution:
    return Convolution(Geometry(inputs, outputs, (), (), (), ()), weight, bias)


def pad(channels=CHANNELS, amount=1, fill=0.0) -> Filter:
    return Filter(Geometry(channels, channels, (1, 1), (1, 1), ((amount, amount),) * 2, (1, 1), channels), 1.0, fill)


def fused(expression, tensors, x=IMAGE):
    weight, bias = evaluate(expression, tensors, LIKE)
    shape = expression.geometry
    assert weight.shape == shape.weight_shape
    padded = F.pad(x, [amount for pair in reversed(shape.padding) for amount in pair])
    return F.conv2d(padded, weight, bias, shape.stride, 0, shape.dilation, shape.groups)


def check(expression, tensors):
    """Compare the map, and all that is said of it, with what its layers compute."""
    assert same(fused(expression, tensors), run(expression, IMAGE, tensors))
    assert tensors.read <= set(expression.tensor_names)
    zero = run(expression, torch.zeros_like(IMAGE), tensors)
    assert same(constant(expression, tensors, CPU), zero[0, :, 3, 3])


@SETTINGS
@given(st.data(), st.integers(0, 10_000))
def test_an_evaluated_expression_computes_what_its_layers_compute(data, seed):
    tensors = Tensors(seed)
    expression = data.draw(expressions(tensors))
    try:
        check(expression, tensors)
    except NotAffine as refused:
        assert refused.code == "shift-before-padding"


THREE, ONE = through(SOURCE, conv()), through(SOURCE, conv(kernel=1, weight="one"))
SHIFTED = through(SOURCE, conv(kernel=1, weight="one", bias="b"))
PART = selected(SOURCE, (1, 3))
TO_FOUR = conv(6, 4, 1, weight="to four")
SHAPES = {
    **{"w": (6, CHANNELS, 3, 3), "one": (6, CHANNELS, 1, 1), "to four": (4, 6, 1, 1), "four": (4, CHANNELS, 3, 3)},
    **{"half": (2, 2, 3, 3), "b": (6,), "b4": (4,), "shift": (6,), "scale": (6,), "scale3": (3,), "shift3": (3,)},
    **{"scale4": (4,), "image": (1, 6, 1, 1)},
}


@pytest.mark.parametrize(
    "expression",
    [
        sum_of((through(SOURCE, conv(outputs=4, weight="four")), SOURCE)),
        sum_of((through(THREE, TO_FOUR), through(SHIFTED, TO_FOUR), Scaled(SOURCE, Factor("scale4")))),
        Scaled(sum_of((THREE, ONE)), Factor("scale")),
        Scaled(sum_of((THREE, SHIFTED)), Offset("shift", 2.0, 2.0)),
        Scaled(Scaled(THREE, Offset("shift")), Factor("scale")),
        Scaled(Scaled(THREE, Factor("scale")), Offset("shift")),
        Scaled(Scaled(THREE, Factor("scale")), Factor(3.0)),
        Scaled(THREE, Factor(3.0), picks=(5, 4, 3, 2, 1, 0)),
        Scaled(THREE, Factor("scale3"), picks=(2, 1, 0, 0, 1, 2)),
        Scaled(SHIFTED, Offset("shift3", 2.0, "scale3"), picks=(0, 0, 1, 1, 2, 2)),
        Scaled(Scaled(THREE, Factor("image")), Offset("image", -1.0)),
        through(Scaled(sum_of((THREE, SHIFTED)), Factor("scale")), TO_FOUR),
        through(Scaled(SHIFTED, Offset("shift", -1.0)), conv(6, 4, 1, weight="to four", bias="b4")),
        through(SHIFTED, Filter(Geometry(6, 6, (2, 2), (1, 1), ((0, 0),) * 2, (1, 1), 6), 0.5)),
        through(Scaled(ONE, Offset("shift")), pad(6, fill="shift")),
        selected(Scaled(SHIFTED, Factor("scale")), (5, 0, 0)),
        joined((THREE, Scaled(SHIFTED, Factor("scale")), SOURCE)),
        joined(tuple(through(selected(SOURCE, half), conv(2, 2, weight="half")) for half in ((0, 1), (2, 3)))),
        sum_of((selected(SOURCE, (1, 3)), through(selected(SOURCE, (1, 3)), conv(2, 2, weight="half")))),
        Scaled(through(selected(SOURCE, (1, 3)), conv(2, 2, weight="half")), Factor(2.0)),
        through(sum_of((PART, Scaled(PART, Factor(2.0)))), conv(2, 2, weight="half")),
        through(selected(SOURCE, (1, 1)), conv(2, 2, weight="half")),
        joined((through(selected(SOURCE, (1, 1)), conv(2, 2, weight="half")), SOURCE)),
    ],
)
def test_evaluated_cases(expression):
    tensors = Tensors()
    for name, shape in SHAPES.items():
        tensors.put(name, *shape)
    check(expression, tensors)


@SETTINGS
@given(st.data(), st.integers(0, 10_000))
def test_borders_are_checked_as_evaluation_checks_them(data, seed):
    tensors = Tensors(seed)
    inner = data.draw(expressions(tensors, depth=2))
    layer = conv(inner.geometry.out_channels, weight=tensors.new(6, inner.geometry.out_channels, 3, 3))
    try:
        whole = through(inner, layer)
        evaluate(inner, tensors, LIKE)
    except NotAffine:
        return
    right = same(run(whole, IMAGE, tensors), _beyond(inner, layer, tensors))
    for told in (lambda: check_borders(inner, layer, tensors, CPU), lambda: evaluate(whole, tensors, LIKE)):
        try:
            told()
        except NotAffine as refused:
            assert refused.code == "shift-before-padding"
            assert not right
        else:
            assert right


def _beyond(inner, layer, tensors):
    """``layer`` after an ``inner`` that goes on beyond the border, as its source does with zeros."""
    wide = run(inner, F.pad(IMAGE, [9] * 4), tensors)
    return run(Through(Identity(wide.shape[1], 2), layer), wide, tensors)[:, :, 9:-9, 9:-9]


@SETTINGS
@given(st.data(), st.integers(0, 10_000))
def test_a_part_of_the_channels_is_an_expression_of_a_smaller_source(data, seed):
    tensors = Tensors(seed)
    expression = data.draw(expressions(tensors))
    channels = channels_read(expression)
    if channels is None:
        return
    smaller = of_channels_read(expression)
    assert same(run(smaller, IMAGE[:, list(channels)], tensors), run(expression, IMAGE, tensors))
    assert smaller.geometry.in_channels == len(channels)


def test_channels_are_read_by_all_terms_or_none():
    some, others = selected(SOURCE, (0, 2)), selected(SOURCE, (1, 3))
    assert channels_read(some) == (0, 2)
    assert channels_read(Scaled(through(some, conv(2)), Factor(2.0))) == (0, 2)
    assert channels_read(sum_of((some, Scaled(some, Factor(2.0))))) == (0, 2)
    assert channels_read(sum_of((some, others))) is None
    assert channels_read(sum_of((some, through(SOURCE, conv(outputs=2))))) is None
    assert channels_read(selected(through(SOURCE, conv()), (1,))) is None
    assert channels_read(joined((some, some))) is None
    assert channels_read(SOURCE) is None
    assert channels_read(selected(SOURCE, (1, 1))) is None


def test_an_expression_whose_channels_are_moved_has_as_many_groups_as_it_reads_blocks():
    halves = [through(selected(SOURCE, half), conv(2, 2)) for half in ((0, 1), (2, 3))]
    assert joined(tuple(halves)).geometry.groups == 2
    assert joined(tuple(reversed(halves))).geometry.groups == 1
    assert selected(SOURCE, (1, 0, 3, 2)).geometry.groups == 2
    assert selected(SOURCE, (0, 1, 2, 3)).geometry.groups == 4
    assert sum_of((joined(tuple(halves)), SOURCE)).geometry.groups == 2
    assert through(selected(SOURCE, (0, 1, 2, 3)), conv(groups=2)).geometry.groups == 2
    assert Scaled(joined(tuple(halves)), Factor(2.0)).geometry.groups == 2
    assert through(Scaled(selected(SOURCE, (1, 0, 3, 2)), Factor(2.0)), conv(groups=2)).geometry.groups == 2


def test_a_sum_of_one_term_is_the_term():
    term = through(SOURCE, conv())
    assert sum_of((term,)) is term
    assert isinstance(sum_of((term, term)), Sum)


def test_what_acts_on_channels_alone_has_the_same_numbers_on_any_number_of_axes():
    """Linear layers in a row, scaled, added up: the same numbers as those of 1x1 in a row."""
    inner = through(Identity(CHANNELS, 0), linear(CHANNELS, 6, "in", "b"))
    rows = sum_of((Scaled(through(inner, linear(6, CHANNELS, "out")), Factor("scale4")), Identity(CHANNELS, 0)))
    tensors = Tensors()
    for name, shape in {"in": (6, CHANNELS), "b": (6,), "out": (CHANNELS, 6), "scale4": (4,)}.items():
        tensors.put(name, *shape)
    wanted = evaluate(rows, tensors, LIKE)
    for ndim in (0, 1, 3):
        made = of_channels_alone(rows, ndim)
        assert made is not None and made.geometry.kernel == (1,) * ndim
        for one, other in zip(evaluate(made, tensors, LIKE), wanted, strict=True):
            assert same(one.reshape(other.shape), other)
    behind = through(through(SOURCE, conv()), Convolution(square(6, 4, 1), "to four", None))
    assert of_channels_alone(behind, 1) is of_channels_alone(sum_of((behind, SOURCE)), 2) is None


def test_a_multiple_of_the_source():
    assert multiple_of_source(SOURCE) == 1
    assert multiple_of_source(Scaled(Scaled(SOURCE, Factor(3.0)), Factor(-2.0))) == -6
    for other in (Factor("t"), Factor(2.0, True), Offset(0.0)):
        assert multiple_of_source(Scaled(SOURCE, other)) is None
        assert multiple_of_source(Scaled(Scaled(SOURCE, other), Factor(2.0))) is None
    assert multiple_of_source(through(SOURCE, conv())) is None


def test_the_tensors_of_an_expression():
    first, filled, last = conv(kernel=1, bias="b"), pad(6, fill="fill"), conv(6, kernel=1, weight="v")
    whole = Scaled(through(Scaled(through(through(SOURCE, first), filled), NORM), last), Offset("o"))
    assert list(whole.tensor_names) == ["w", "b", "fill", "mean", "var", "weight", "bias", "v", "o"]
    assert list(Scaled(SOURCE, Factor("f")).tensor_names) == ["f"]
    assert list(Scaled(SOURCE, Factor(2.0)).tensor_names) == []
    assert list(through(SOURCE, pool()).tensor_names) == []
    assert list(joined((through(SOURCE, first), selected(SOURCE, (1,)))).tensor_names) == ["w", "b"]
    whole = homogeneous(through(SOURCE, first))
    assert whole.convolves and list(whole.tensor_names) == ["w", "b"]


def test_what_adds_nothing_whatever_the_weights():
    """No weight is read to find that out."""

    def added(expression):
        tensors = Tensors()
        for name, size in {"f": CHANNELS, "v": CHANNELS, "w": CHANNELS, "m": CHANNELS, "b": CHANNELS}.items():
            tensors[name] = torch.arange(1.0, size + 1, dtype=torch.float64)
        return constant(expression, tensors, CPU), tensors.read

    for by in (Factor("f"), Normalisation(None, "v", "w", None, 0.1)):
        nothing, read = added(Scaled(SOURCE, by))
        assert not nothing.any() and not read
    for by in (Offset(1.0), Normalisation("m", "v", None, None, 0.1), Normalisation(None, "v", None, "b", 0.1)):
        assert added(Scaled(SOURCE, by))[0].all()
    assert added(sum_of((SOURCE, Scaled(SOURCE, Offset(1.0)))))[0].all()
    assert added(selected(through(SOURCE, conv(outputs=CHANNELS, bias="b")), (0,)))[0].all()


@pytest.mark.parametrize("order", [(), (3, 1, 0, 2, *range(23, 3, -1))])
def test_the_constant_of_pixels_taken_apart_is_in_their_order(order):
    tensors = Tensors()
    tensors.put("one", 6, CHANNELS, 1, 1)
    tensors.put("b", 6)
    taken = F.pixel_unshuffle(run(SHIFTED, torch.zeros_like(IMAGE)[..., :6], tensors), 2)
    expected = taken[0, :, 1, 1][list(order)] if order else taken[0, :, 1, 1]
    apart = Phases.of(6, (2, 2), order)
    assert apart.geometry.keeps_edges
    assert torch.equal(constant(through(SHIFTED, apart), tensors, CPU), expected)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shape", [square(CHANNELS, 6, 3, 2), square(CHANNELS, 6, 1)])
def test_a_norm_behind_a_map_leaves_it_what_it_is(shape, zero):
    """With a range of 1 in each channel that is not zero."""
    tensors, (mean, var) = Tensors(), torch.rand(2, 6, dtype=torch.float64) + 0.5
    tensors.put("w", *shape.weight_shape)
    tensors.put("b", 6)
    if zero:
        tensors["w"][2] = 0
    expression = through(SOURCE, Convolution(shape, "w", "b"))
    made, scale, shift = behind_norm(expression, tensors, mean, var, 0.1)
    ranges = made.abs().flatten(1).amax(1)
    assert ranges.tolist() == [0.0 if zero and row == 2 else 1.0 for row in range(6)]
    y = F.conv2d(IMAGE, made, None, 1, [pair[0] for pair in shape.padding], 1, shape.groups)
    assert same(F.batch_norm(y, mean, var, scale, shift, eps=0.1), run(expression, IMAGE, tensors))


def test_the_source_has_no_constant():
    assert constant(SOURCE, Tensors(), CPU).tolist() == [0] * CHANNELS
    assert constant(SOURCE, Tensors(), CPU).dtype == torch.float64


# --- padding with another number than zero


@pytest.mark.parametrize("layer", [pool(6, fill=3.0), pad(6, fill=3.0), pad(6, fill="fill"), pool(6, fill="fill")])
@pytest.mark.parametrize("one", [True, False])
def test_what_pads_with_the_constant_before_it_composes(layer, one):
    tensors = Tensors()
    weight, bias = tensors.new(6, CHANNELS, 1, 1), tensors.new(6)
    if layer.fill == 3.0:
        tensors[bias] = torch.full((6,), 3.0, dtype=torch.float64)
    tensors["fill"] = tensors[bias] if one else tensors[bias] + 1e-9
    inner = through(SOURCE, conv(kernel=1, weight=weight, bias=bias))
    whole = through(inner, layer)
    if one or layer.fill == 3.0:
        check_borders(inner, layer, tensors, CPU)
        assert same(fused(whole, tensors), run(whole, IMAGE, tensors))
    else:
        for refused in (lambda: check_borders(inner, layer, tensors, CPU), lambda: evaluate(whole, tensors, LIKE)):
            with pytest.raises(NotAffine) as raised:
                refused()
            assert raised.value.code == "shift-before-padding"


def test_an_unshifted_map_is_not_padded_with_a_number():
    inner = through(SOURCE, conv(kernel=1, weight="w"))
    tensors = {"w": torch.ones(6, CHANNELS, 1, 1), "zeros": torch.zeros(6), "ones": torch.ones(6)}.__getitem__
    for fine in (pad(6), pad(6, fill="zeros"), pad(6, amount=0, fill=1.0), pad(6, amount=-1, fill=1.0), conv(6)):
        check_borders(inner, fine, tensors, CPU)
    for wrong in (pad(6, fill=1.0), pad(6, fill="ones")):
        with pytest.raises(NotAffine):
            check_borders(inner, wrong, tensors, CPU)


# --- dtype and device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_is_rounded_once(dtype):
    tensors = Tensors()
    one, two = (tensors.new(6, CHANNELS, 3, 3) for _ in range(2))
    norm = Normalisation(*(tensors.new(6, positive=True) for _ in range(4)), 0.1)
    for name in tensors:
        tensors[name] = tensors[name].to(dtype)
    expression = Scaled(sum_of((through(SOURCE, conv(weight=one)), through(SOURCE, conv(weight=two)))), norm)
    exact = evaluate(expression, tensors, LIKE)
    for rounded, number in zip(evaluate(expression, tensors, LIKE.to(dtype)), exact, strict=True):
        assert rounded.dtype == dtype
        assert torch.equal(rounded, number.to(dtype))


def test_the_result_shares_no_memory_with_the_model():
    tensors = {"w": torch.ones(6, CHANNELS, 3, 3, dtype=torch.float64), "b": torch.ones(6, dtype=torch.float64)}
    for result in evaluate(through(SOURCE, conv(bias="b")), tensors.__getitem__, LIKE):
        result.zero_()
    assert all(tensor.all() for tensor in tensors.values())


@settings(SETTINGS, max_examples=30)
@given(st.data())
def test_everything_is_computed_where_the_model_is(data):
    tensors = Tensors()
    expression = data.draw(expressions(tensors))
    meta = torch.device("meta")
    for name in tensors:
        tensors[name] = tensors[name].to(meta)
    try:
        results = evaluate(expression, tensors, LIKE.to(meta))
    except (NotImplementedError, RuntimeError) as error:  # whether numbers agree cannot be told without numbers
        assert "meta" in str(error) and ("item" in str(error) or "is_nonzero" in str(error))
        return
    assert {result.device for result in results} == {meta}


@pytest.mark.parametrize(
    "moved",
    [
        SOURCE,
        selected(SOURCE, (1, 0)),
        joined((SOURCE, SOURCE)),
        through(SOURCE, pool()),
        sum_of((PART, through(PART, pool(2)))),
        sum_of((through(SOURCE, pool()), joined((PART, PART)))),
    ],
)
def test_what_reads_no_tensor_is_computed_where_it_is_wanted(moved):
    for result in evaluate(moved, Tensors(), LIKE.to("meta")):
        assert result.device.type == "meta"
    assert constant(moved, Tensors(), torch.device("meta")).device.type == "meta"


# --- for people


def test_what_a_layer_leaves_out_changes_nothing():
    assert Offset(3.0) == Offset(3.0, factor=1.0, scale=1.0)
    assert Factor(3.0) == Factor(3.0, inverse=False)
    assert pool() == Filter(pool().geometry, 1 / 9, fill=0.0)


MEMBERS = {
    "one": lambda: conv_of(1),
    "other": lambda: conv_of(1),
    "bare": lambda: conv_of(1, bias=False),
    "three": lambda: conv_of(3),
    "grouped": lambda: conv_of(3, groups=2),
    "valid": lambda: conv_of(3, padding=0),
    "wide": lambda: conv_of((1, 2), padding=0),
    "pixels": lambda: conv_of(1, inputs=16),
    "norm": lambda: nn.BatchNorm2d(4),
    "rows": lambda: nn.BatchNorm1d(4),
    "linear": lambda: nn.Linear(4, 4),
    "tokens": lambda: nn.Linear(4, 4),
    "g": lambda: nn.Parameter(torch.ones(4, 1, 1)),
    "last": lambda: nn.Parameter(torch.ones(4)),
}


def merged(forward, *shape, policy=Policy.ALWAYS):
    """The branches of each place that a plan merges, which computes the same then."""
    model, x = randomised(Spelled(forward, **{name: make() for name, make in MEMBERS.items()})), image(*shape)
    result = fuse(model, (x,), policy, keep_class=False)
    assert error(model, result.module, x) < 1e-12 and error(model, result.module, image(3, *shape[1:])) < 1e-12
    return [site.branches for site in result.plan.sites]


SHOWN = [
    (
        lambda m, x: m.three(x) + m.one(x) + m.norm(m.grouped(x)) + x,
        ("conv 3x3", "conv 1x1", "conv 3x3 groups 2 + norm", "skip"),
    ),
    (
        lambda m, x: m.rows((m.three(x) + m.one(x)).flatten(2)),
        ("conv 3x3 (norm after the sum)", "conv 1x1 (norm after the sum)"),
    ),
    (lambda m, x: m.norm(m.three(x) + m.one(x)), ("conv 3x3 + norm", "conv 1x1 + norm")),
    (lambda m, x: 0.5 * m.three(x) + x, ("0.5 * conv 3x3", "skip")),
    (lambda m, x: m.three(x) / 4 + x, ("0.25 * conv 3x3", "skip")),
    (lambda m, x: m.three(x) * m.g + x, ("conv 3x3 + scale", "skip")),
    (lambda m, x: m.three(x) + m.g + x, ("conv 3x3 + shift", "skip")),
    (lambda m, x: m.valid(m.norm(m.one(x))), ("conv 1x1 + norm → conv 3x3",)),
    (lambda m, x: m.valid(m.one(x) + m.other(x)), ("(conv 1x1 and conv 1x1) → conv 3x3",)),
    (lambda m, x: m.three(x) + F.avg_pool2d(x, 3, 1, 1), ("conv 3x3", "avg 3x3")),
    (lambda m, x: m.wide(x) + F.avg_pool2d(x, (1, 2), 1), ("conv 1x2", "avg 1x2")),
    (lambda m, x: m.valid(F.pad(x, (1, 1, 1, 1))) + m.one(x), ("pad → conv 3x3", "conv 1x1")),
    (lambda m, x: m.valid(x) + x[:, :, 1:-1, 1:-1], ("conv 3x3", "crop")),
    (lambda m, x: m.wide(x)[:, :, 1:] + m.wide(x[:, :, 1:]), ("conv 1x2 → crop", "crop → conv 1x2")),
    (lambda m, x: m.linear(x) + m.tokens(x) + x, ("linear", "linear", "skip")),
    (lambda m, x: m.three(x)[:, ::2] + x[:, ::2], ("conv 3x3 → 2 of 4 channels", "2 of 4 channels")),
    (lambda m, x: torch.cat([m.three(x), m.one(x), x], 1), ("cat(conv 3x3, conv 1x1, skip)",)),
    (lambda m, x: m.pixels(F.pixel_unshuffle(x, 2)), ("unshuffle 2x2 → conv 1x1",)),
]


@pytest.mark.parametrize(("forward", "names"), SHOWN)
def test_branches_for_people(forward, names):
    assert merged(forward, 2, 4, 6, 4) == [names]


@pytest.mark.parametrize(
    ("forward", "sites"),
    [
        (lambda m, x: m.linear(2 * x) + m.tokens(x), [("2 * skip → linear", "linear")]),
        (lambda m, x: m.linear(x) + 2 * x, [("linear", "2 * skip")]),
        (lambda m, x: m.linear(-3 * (2 * x)) + m.tokens(x), [("-3 * 2 * skip → linear", "linear")]),
        (lambda m, x: m.linear((x - 0.5) / 0.25), [("4 * skip + shift → linear",)]),
        (lambda m, x: m.linear(x + 0.5) + x, [("skip + shift → linear", "skip")]),
        (lambda m, x: (x + 0.5) + m.linear(x), [("skip + shift", "linear")]),
        (lambda m, x: m.linear(x) + (1 - x), [("linear", "skip + shift")]),
        (lambda m, x: m.linear((x + 0.5) * m.last), [("skip + shift + scale → linear",)]),
        (lambda m, x: m.linear(m.rows(x.mT).mT), [("skip + norm → linear",)]),
        (lambda m, x: m.linear(m.rows(x.mT).mT.relu()), []),
    ],
)
def test_a_source_has_its_channels_where_the_layer_behind_it_has_them(forward, sites):
    """Also where it is scaled or shifted before, by a number for all."""
    assert merged(forward, 2, 3, 4) == sites


@pytest.mark.parametrize("before", [lambda m, x: x * m.g, lambda m, x: x + m.g, lambda m, x: m.three(x)])
def test_what_has_channels_elsewhere_is_nothing_to_the_layer_behind_it(before):
    """Of as many rows as there are channels."""
    assert merged(lambda m, x: m.linear(before(m, x)), 2, 4, 5, 4) == []


@pytest.mark.parametrize(
    ("forward", "sites"),
    [
        (lambda m, x: m.one(m.linear(x).permute(0, 3, 1, 2)), [("conv 1x1 → conv 1x1",)]),
        (lambda m, x: m.valid(m.tokens(m.linear(x)).permute(0, 3, 1, 2)), [("conv 1x1 → conv 1x1 → conv 3x3",)]),
        (
            lambda m, x: m.one((m.linear(x) * m.last + x).permute(0, 3, 1, 2)),
            [("(conv 1x1 + scale and skip) → conv 1x1",)],
        ),
        (lambda m, x: m.linear(m.one(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), [("linear → linear",)]),
        (lambda m, x: m.linear(m.three(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), []),
        (
            lambda m, x: m.linear((m.three(y := x.permute(0, 3, 1, 2)) + m.one(y)).permute(0, 2, 3, 1)),
            [("conv 3x3", "conv 1x1")],
        ),
    ],
)
def test_what_acts_on_channels_alone_does_so_on_as_many_axes_as_there_are(forward, sites):
    """Linear layers in a row, scaled, added up, are 1x1 in a row; what reads pixels around has no such twin."""
    assert merged(forward, 2, 5, 6, 4) == sites


@pytest.mark.parametrize(
    "beside",
    [
        lambda m, y: y,
        lambda m, y: 3.0 * (-2.0 * y),
        lambda m, y: y / 4,
        lambda m, y: y * m.g,
        lambda m, y: 2 * (y * m.g),
        lambda m, y: y + 0.5,
        lambda m, y: 2 * (y + 0.5),
    ],
)
def test_a_multiple_of_another_source_stays_beside_what_is_merged(beside):
    sites = merged(lambda m, x: m.three(x) + beside(m, torch.sin(x)) + m.one(x), 2, 4, 6, 5)
    assert sites[:1] == [("conv 3x3", "conv 1x1")]


@pytest.mark.parametrize(
    ("forward", "sites"),
    [
        (lambda m, x: m.valid(F.pad(x, (1, 1, 1, 1))), [("pad → conv 3x3",)]),
        (lambda m, x: F.pad(m.bare(x), (1, 1, 1, 1)), [("conv 1x1 → pad",)]),
        (lambda m, x: m.valid(F.avg_pool2d(x, 3, 1)), []),
        (lambda m, x: m.valid(F.avg_pool2d(x, (1, 2), 1)), []),
        (lambda m, x: m.valid(m.one(x)), []),
        (lambda m, x: F.avg_pool2d(m.one(x), 2), []),
        (lambda m, x: m.valid(F.pad(m.bare(x), (1, 1, 1, 1))), [("pad → conv 3x3",)]),
    ],
)
def test_layers_in_a_row_that_compute_stay_that_where_they_are_to(forward, sites):
    assert merged(forward, 2, 4, 6, 5, policy=Policy.NEVER_COMPOSE) == sites


@SETTINGS
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.integers(0, 10_000))
def test_constants_that_cancel_are_judged_alike_by_the_plan_and_by_who_writes_it(factors, seed):
    """(s x + t) - (s x + t) adds nothing, but for rounding, in whatever order it is summed up."""
    tensors = Tensors(seed)
    shifted = Scaled(SOURCE, Offset(tensors.new(CHANNELS)))
    terms = [Scaled(shifted, Factor(sign * factor)) for sign in (1, -1) for factor in factors]
    layer = conv(weight=tensors.new(6, CHANNELS, 3, 3))
    inner = sum_of((through(SOURCE, conv(CHANNELS, CHANNELS, 1, weight=tensors.new(CHANNELS, CHANNELS, 1, 1))), *terms))
    answers = []
    for told in (
        lambda: check_borders(inner, layer, tensors, CPU),
        lambda: evaluate(through(inner, layer), tensors, LIKE),
    ):
        try:
            told()
            answers.append("")
        except NotAffine as error:
            answers.append(error.code)
    assert answers[0] == answers[1]
