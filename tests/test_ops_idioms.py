"""Several nodes that mean one thing together: a filled border, a channel shuffle, a sum over a stack, a list."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.maps import apply
from support.meanings import SIZES, Network, check, meaning_at, read
from torch import nn
from torch.nn import functional as F

from repfuse.algebra.affine import AffineConv
from repfuse.algebra.expression import Joined, Scaled, Selected, Through
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Filter, Phases
from repfuse.ops.meaning import Passage, Rearranged, Same, combination

aten = torch.ops.aten
SHAPES = [(2, 4, *size) for size in SIZES[2]]


def assign(t, index, value):
    t[index] = value
    return t


def fill(t, value, before=1, after=1):
    whole = slice(None)
    t = assign(t, (whole, whole, slice(0, before), whole), value)
    t = assign(t, (whole, whole, slice(-after, None), whole), value)
    t = assign(t, (whole, whole, whole, slice(0, before)), value)
    return assign(t, (whole, whole, whole, slice(-after, None)), value)


def border(padding, amount) -> Through:
    geometry = Geometry(4, 4, (1, 1), (1, 1), padding, (1, 1), 4)
    return Through("x", Filter(geometry, 1.0, amount))


ROUND = ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), m.image), border(ROUND, "image")),
        (lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1), value=9), m.column), border(ROUND, "column")),
        (lambda m, x, y: fill(m.pad(x), m.image), border(ROUND, "image")),
        (lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), m.gamma.view(1, -1, 1, 1)), border(ROUND, "%view")),
        (lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), 0.5), border(ROUND, 0.5)),
        (lambda m, x, y: fill(F.pad(x, (2, 3, 2, 3)), m.image, 2, 3), border(((2, 3), (2, 3)), "image")),
        (
            lambda m, x, y: assign(
                assign(F.pad(x, (0, 1, 2, 0)), (..., slice(-1, None)), m.image),
                (slice(None), slice(None), slice(2)),
                m.image,
            ),
            border(((2, 0), (0, 1)), "image"),
        ),
    ],
)
def test_a_border_that_is_filled_by_assignments(function, expected):
    assert meaning_at(function, SHAPES, pad=nn.ZeroPad2d(1)) == expected


def test_the_steps_of_a_filled_border_are_passages():
    found = read(Network(lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), m.image)), torch.ones(1, 4, 3, 3).double())
    assert [found.of(name) for name in ("pad", "assigned", "assigned_1", "assigned_2")] == [
        Passage(),
        Passage(),
        Passage(),
        Passage(),
    ]


def three_sides(m, x, y):
    t = F.pad(x, (1, 1, 1, 1))
    for index in ((..., slice(0, 1)), (..., slice(-1, None)), (..., slice(0, 1), slice(None))):
        t = assign(t, index, m.image)
    return t


def read_before(m, x, y):
    padded = F.pad(x, (1, 1, 1, 1))
    total = padded.sum()
    return fill(padded, m.image) + total


def read_afterwards(m, x, y):
    padded = F.pad(x, (1, 1, 1, 1))
    return fill(padded, m.image) + padded.sum()


@pytest.mark.parametrize(
    "function",
    [
        three_sides,
        lambda m, x, y: fill(F.pad(x, (2, 2, 2, 2)), m.image),  # half of the border
        lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), m.image, 2, 2),  # more than the border
        lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), m.bias[0]),  # one number for four channels has another shape
        lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), x[:, :, :1, :1]),
        lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1), mode="reflect"), m.image),
        lambda m, x, y: fill(F.pad(x, (1, -1, 1, 1)), m.image),
        lambda m, x, y: assign(fill(F.pad(x, (1, 1, 1, 1)), m.image), (..., slice(1, 2), slice(None)), m.image),
        lambda m, x, y: assign(three_sides(m, x, y), (..., slice(-1, None), slice(None)), m.column),
        lambda m, x, y: assign(three_sides(m, x, y), (..., -1, slice(None)), m.gamma.view(4, 1)),
        lambda m, x, y: assign(three_sides(m, x, y), (..., [-1], slice(None)), m.image),
        lambda m, x, y: assign(three_sides(m, x, y), (..., slice(-1, None), slice(-1, None)), m.image),  # a corner
        lambda m, x, y: assign(three_sides(m, x, y), (slice(None), slice(-1, None)), 0.5),
        lambda m, x, y: assign(three_sides(m, x, y), ..., 0.5),
        lambda m, x, y: fill(x * 2, m.image),
        lambda m, x, y: fill(x, m.image),
    ],
)
def test_assignments_that_do_not_fill_exactly_the_border_mean_nothing(function):
    assert meaning_at(function, [(2, 4, 6, 7)]) is None


def test_a_pad_whose_border_is_filled_in_part_is_a_pad():
    found = read(Network(three_sides), torch.ones(1, 4, 3, 3).double())
    assert found.of("pad") == border(ROUND, 0.0)
    assert (found.of("assigned"), found.of("assigned_1"), found.of("assigned_2")) == (None, None, None)


@pytest.mark.parametrize(("channels", "size"), [(1, (5, 6)), (4, (5, 6)), (4, (1, 6))])
def test_one_number_fills_the_border_of_one_channel_only(channels, size):
    said = meaning_at(lambda m, x, y: fill(F.pad(x, (1, 1, 1, 1)), m.single), [(2, channels, *size)])
    shape = Geometry(1, 1, (1, 1), (1, 1), ROUND, (1, 1), 1)
    assert said == (Through("x", Filter(shape, 1.0, "single")) if channels == 1 else None)


def test_a_pad_that_something_else_reads_is_not_part_of_a_border():
    found = read(Network(read_before), torch.ones(1, 4, 3, 3).double())
    assert found.of("assigned_3") is None
    assert found.of("pad") == border(ROUND, 0.0)


def test_who_reads_a_pad_after_the_assignments_reads_the_filled_border():
    found = read(Network(read_afterwards), torch.ones(1, 4, 3, 3).double())
    assert found.of("assigned_3") == border(ROUND, "image")
    assert next(node for node in found.meanings if node.name == "sum").args[0].name == "assigned_3"


def shuffled(x, first, last, turn=lambda t: t.transpose(1, 2), copy=lambda t: t.contiguous()):
    return copy(turn(x.view(first))).view(last)


SHUFFLES = [
    lambda m, x, y: shuffled(x, (x.size(0), 2, 2, x.size(2), x.size(3)), (x.size(0), 4, x.size(2), x.size(3))),
    lambda m, x, y: shuffled(x, (x.shape[0], 2, -1, x.shape[2], x.shape[3]), (x.shape[0], -1, x.shape[2], x.shape[3])),
    lambda m, x, y: shuffled(
        x, (-1, 2, 2, x.size(2), x.size(3)), (-1, 4, x.size(2), x.size(3)), lambda t: t.permute(0, 2, 1, 3, 4)
    ),
    lambda m, x, y: shuffled(
        x,
        (x.size()[0], -1, 2, x.size()[-2], x.size(-1)),
        (x.size(0), x.size(1), x.size(2), -1),
        lambda t: torch.swapaxes(t, 2, 1),
        lambda t: t.clone(memory_format=torch.contiguous_format),
    ),
    lambda m, x, y: x.reshape(x.size(0), 2, x.size(1) // 2, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2),
    lambda m, x, y: torch.flatten(
        torch.reshape(x, (x.size(0), 2, 2, x.size(2), -1)).transpose(-4, -3), start_dim=1, end_dim=-3
    ),
    lambda m, x, y: torch.permute(x.view(x.size(0), 2, 2, x.size(2), x.size(3)), (0, 2, 1, 3, 4)).reshape(
        x.size(0), 4, x.size(2), x.size(3)
    ),
    lambda m, x, y: (
        x.view(x.size(0), 2, 2, x.size(2), x.size(3)).transpose(1, 2).reshape(x.size(0), -1, x.size(2), x.size(3))
    ),
    lambda m, x, y: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    lambda m, x, y: torch.unflatten(x, -3, [2, -1]).swapaxes(1, 2).flatten(1, 2),
    lambda m, x, y: aten.unflatten.int(x, 1, [2, -1]).swapaxes(1, 2).flatten(1, 2),
]


@pytest.mark.parametrize("function", SHUFFLES)
def test_channel_shuffles(function):
    assert meaning_at(function, SHAPES) == Selected("x", (0, 2, 1, 3), 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: x.view(x.size(0), -1, 1, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2),
        lambda m, x, y: x.view(x.size(0), 1, 4, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2),
    ],
)
def test_a_shuffle_of_one_group_moves_nothing(function):
    assert meaning_at(function, SHAPES) == Selected("x", (0, 1, 2, 3), 1)


def test_sizes_may_be_products_of_sizes():
    def function(m, x, y):
        half, axes = x.size(1) // 2, (x.size(2), x.size(3))
        return shuffled(x, (x.size(0), 2, half, *axes), (x.size(0), half * 2, *axes))

    assert meaning_at(function, SHAPES) == Selected("x", (0, 2, 1, 3), 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: shuffled(x, (x.size(0), 2, 2, y.size(2), y.size(3)), (x.size(0), 4, x.size(2), x.size(3))),
        lambda m, x, y: x.view(x.size(0), 2, x.size(2) // 3, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2),
    ],
)
def test_sizes_may_be_whatever_lets_the_network_run(function):
    """Where they are others, the view fails."""
    assert meaning_at(function, [(2, 4, 6, 6)]) == Selected("x", (0, 2, 1, 3), 1)


def unshuffled(x, order=(0, 1, 3, 5, 2, 4)):
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(order).reshape(n, 4 * c, h // 2, w // 2)


@pytest.mark.parametrize(
    ("function", "order"),
    [
        (lambda m, x, y: F.pixel_unshuffle(x, 2), ()),
        (lambda m, x, y: unshuffled(x), ()),
        (lambda m, x, y: unshuffled(x, (0, 3, 5, 1, 2, 4)), (0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11)),
        (lambda m, x, y: unshuffled(x, (0, 1, 5, 3, 2, 4)), (0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11)),
    ],
)
def test_space_to_depth(function, order):
    assert meaning_at(function, [(2, 3, 6, 8), (1, 3, 10, 2)]) == Through("x", Phases.of(3, (2, 2), order))
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    made = apply(AffineConv.phases(Phases.of(3, (2, 2), order)), x)
    assert torch.equal(made, function(None, x, None))


def test_blocks_of_pixels_have_other_sizes_too():
    shapes = [(2, 9, 3, 6), (1, 9, 6, 3)]
    nine = Rearranged("x", ((1, 1),), (0,) * 9, tuple(range(9)))
    assert meaning_at(lambda m, x, y: F.pixel_shuffle(x, 3), shapes) == nine
    assert meaning_at(lambda m, x, y: F.pixel_unshuffle(x, 3), shapes) == Through("x", Phases.of(9, (3, 3)))
    assert meaning_at(lambda m, x, y: F.pixel_unshuffle(x, 1), shapes) == Same("x")


def test_space_to_depth_along_one_axis():
    def function(m, x, y):
        n, c, t = x.shape
        return x.view(n, c, t // 3, 3).transpose(2, 3).reshape(n, 3 * c, t // 3)

    assert meaning_at(function, [(2, 5, 6), (1, 5, 9)]) == Through("x", Phases.of(5, (3,)))


@pytest.mark.parametrize(
    ("function", "channels", "phases"),
    [
        (lambda m, x, y: F.pixel_shuffle(x, 2), (0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 2, 3, 0, 1, 2, 3)),
        (
            lambda m, x, y: (
                x.view(-1, 2, 2, 2, x.size(2), x.size(3))
                .permute(0, 1, 4, 2, 5, 3)
                .reshape(-1, 2, 2 * x.size(2), 2 * x.size(3))
            ),
            (0, 0, 0, 0, 1, 1, 1, 1),
            (),
        ),
        (
            lambda m, x, y: (
                x.view(-1, 2, 2, 2, x.size(2), x.size(3))
                .permute(0, 3, 4, 1, 5, 2)
                .reshape(-1, 2, 2 * x.size(2), 2 * x.size(3))
            ),
            (0, 1, 0, 1, 0, 1, 0, 1),
            (),
        ),
    ],
)
def test_depth_to_space(function, channels, phases):
    """By views, it is for this number of channels alone."""
    assert meaning_at(function, [(2, 8, 5, 7), (1, 8, 3, 6)]) == Rearranged("x", ((1, 1),), channels, phases)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: unshuffled(x, (0, 1, 2, 5, 3, 4)),  # what is left of an axis, among the channels
        lambda m, x, y: unshuffled(x, (0, 1, 3, 5, 4, 2)),
        lambda m, x, y: (
            x.view(x.size(0), 3, 2, x.size(2) // 2, x.size(3))
            .transpose(2, 3)
            .reshape(x.size(0), -1, x.size(2) // 2, x.size(3))
        ),
    ],
)
def test_other_views_are_no_space_to_depth(function):
    assert meaning_at(function, [(2, 3, 8, 8), (1, 3, 2, 2)]) is None


def test_the_first_of_three_steps_is_a_view():
    """What computes there is no step: the three would leave it out."""
    found = meaning_at(lambda m, x, y: (x * 3).permute(0, 1, 2, 3).reshape(x.shape), SHAPES)
    assert not isinstance(found, Selected)


def test_channel_shuffle_in_atens_spelling():

    def function(m, x, y):
        n, h, w = (aten.sym_size.int(x, axis) for axis in (0, 2, 3))
        t = aten.view.default(x, [n, 2, 2, h, w])
        t = aten.permute.default(t, [0, 2, 1, 3, 4])
        t = aten.clone.default(t, memory_format=torch.contiguous_format)
        return aten._unsafe_view.default(t, [n, 4, h, w])

    assert meaning_at(function, SHAPES) == Selected("x", (0, 2, 1, 3), 1)


def test_a_shuffle_in_a_network_of_one_size():
    positions = nn.Module()
    positions.tensor = nn.Parameter(torch.randn(6, 7, dtype=torch.float64))

    def function(m, x, y):
        return SHUFFLES[0](m, x, y) * y + m.positions.tensor

    found = read(Network(function, positions=positions), torch.randn(2, 4, 6, 7).double())
    assert found.of("view_1") == Selected("x", (0, 2, 1, 3), 1)


def test_groups_and_channels_of_a_shuffle_are_not_mixed_up():
    def function(m, x, y):
        return x.view(x.size(0), 3, 2, x.size(2)).transpose(1, 2).flatten(1, 2)

    assert meaning_at(function, [(2, 6, 5), (1, 6, 4)]) == Selected("x", (0, 2, 4, 1, 3, 5), 1)


def test_the_steps_of_a_shuffle_are_passages():
    found = read(Network(SHUFFLES[0]), torch.ones(1, 4, 3, 3).double())
    assert [found.of(name) for name in ("view", "transpose", "contiguous")] == [
        Passage(),
        Passage(),
        Passage(),
    ]
    assert read(Network(SHUFFLES[2]), torch.ones(1, 4, 3, 3).double()).of("permute") == Passage()


# At the square example the wrong sizes are right by chance; at the second input the network does something else.
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: shuffled(x, (x.size(0), 2, 2, 6, -1), (x.size(0), 4, x.size(2), x.size(3))),
        lambda m, x, y: shuffled(x, (x.size(0), 2, 2, x.size(3), x.size(2)), (x.size(0), 4, x.size(2), x.size(3))),
        lambda m, x, y: shuffled(x, (x.size(0), 2, 2, x.size(2), x.size(3)), (x.size(0), 4, x.size(3), x.size(2))),
        lambda m, x, y: shuffled(x, (x.size(0), 2, 2, x.size(2), x.size(3)), (-1, 4, 6, 6)),
    ],
)
def test_sizes_that_are_right_at_the_example_only_are_no_shuffle(function):
    assert meaning_at(function, [(2, 4, 6, 6)]) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: x.view(x.size(0), 2, 2, x.size(2), x.size(3)).transpose(2, 3).flatten(1, 2),
        lambda m, x, y: x.view(x.size(0), 2, 2, x.size(2), x.size(3)).permute(0, 2, 1, 4, 3).flatten(1, 2),
        lambda m, x, y: x.view(x.size(0), 2, 2, x.size(2), x.size(3)).transpose(1, 2).flatten(0, 1),
        lambda m, x, y: x.view(x.size(0), 2, 2, x.size(2), x.size(3)).flatten(1, 2),
        lambda m, x, y: x.view(x.size(0), 2, 2, x.size(2), x.size(3)).transpose(1, 2).view(torch.int64),
        lambda m, x, y: F.channel_shuffle(x, 1 + x.size(2) // 64),
        lambda m, x, y: F.channel_shuffle(x, y.size(0)),
    ],
)
def test_other_views_are_no_shuffle(function):
    assert meaning_at(function, [(2, 4, 6, 6)]) is None


def test_a_height_is_no_number_of_channels():
    def function(m, x, y):
        return x.view(x.size(0), 2, x.size(2), 2, x.size(3)).transpose(1, 2).flatten(1, 2)

    assert meaning_at(function, [(2, 4, 2, 7)]) is None


def test_a_view_that_something_else_reads_is_no_passage():
    def function(m, x, y):
        view = x.view(x.size(0), 2, 2, x.size(2), x.size(3))
        return view.transpose(1, 2).flatten(1, 2) * view.mean()

    found = read(Network(function), torch.ones(1, 4, 3, 3).double())
    assert found.of("view") is None
    assert found.of("transpose") == Passage()
    assert found.of("flatten") == Selected("x", (0, 2, 1, 3), 1)


def test_a_stack_is_a_passage_where_only_sums_read_it():
    found = read(Network(lambda m, x, y: torch.stack([x, y, x], 1).mean(1)), torch.ones(1, 4, 3, 3).double())
    assert found.of("stack") == Passage()
    assert found.meaning == combination(("x", 1 / 3), ("y", 1 / 3), ("x", 1 / 3))

    assert meaning_at(lambda m, x, y: torch.stack([x]).sum(0), SHAPES) == combination(("x", 1.0))
    cut = read(Network(lambda m, x, y: torch.stack([x, y]).narrow(0, 0, 1)), torch.ones(1, 4, 3, 3).double())
    assert cut.of("stack") is None

    def escaping(m, x, y):
        stack = torch.stack([x, y])
        return stack.sum(0) + stack[0]

    found = read(Network(escaping), torch.ones(1, 4, 3, 3).double())
    assert found.of("stack") is None
    assert found.of("sum") == combination(("x", 1.0), ("y", 1.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: torch.stack([x, y], 1).sum(0),
        lambda m, x, y: torch.stack([x, y]).sum(),
        lambda m, x, y: torch.stack([x, y]).sum((0, 1)),
        lambda m, x, y: torch.stack([x, y]).sum(0, keepdim=True),
        lambda m, x, y: torch.stack([x, y]).sum(0, dtype=torch.float32),
        lambda m, x, y: torch.stack([x, m.image.expand(2, 4, 6, 7)]).sum(0),
        lambda m, x, y: torch.stack(x.chunk(2, 0)).sum(),
        lambda m, x, y: x.sum(0),
    ],
)
def test_other_sums_mean_nothing(function):
    assert meaning_at(function, [(2, 4, 6, 7)]) is None


def test_a_list_of_parts_is_a_passage_where_only_its_parts_are_read():
    def function(m, x, y):
        one, other = x.chunk(2, 1)
        return one + other

    found = read(Network(function), torch.ones(1, 4, 3, 3).double())
    assert found.of("chunk") == Passage()
    assert [found.of(name) for name in ("getitem", "getitem_1")] == [
        Selected("x", (0, 1), 1),
        Selected("x", (2, 3), 1),
    ]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x, y: torch.stack(x.chunk(2, 1)).sum(0), combination(("getitem", 1.0), ("getitem_1", 1.0))),
        (lambda m, x, y: torch.cat(x.chunk(2, 1), 1), Joined(("getitem", "getitem_1"), 1)),
        (lambda m, x, y: x.chunk(2, 1)[1:][0], Selected("x", (2, 3), 1)),
        (lambda m, x, y: [*x.chunk(2, 1)].pop(), Selected("x", (2, 3), 1)),
    ],
)
def test_who_takes_the_whole_list_of_parts_takes_its_parts(function, expected):
    assert meaning_at(function, SHAPES) == expected
    assert read(Network(function), torch.ones(1, 4, 3, 3).double()).of("chunk") == Passage()


@pytest.mark.parametrize("function", [lambda m, x, y: x.chunk(2, 0)[0], lambda m, x, y: x.chunk(2, 2)[0]])
def test_other_lists_of_parts_mean_nothing(function):
    found = read(Network(function), torch.ones(2, 4, 3, 3).double())
    assert (found.of("chunk"), found.of("getitem")) == (None, None)


def test_the_statistics_that_a_normalisation_returns_mean_nothing():
    def function(m, x, y):
        parts = torch.ops.aten.native_batch_norm.default(x, None, None, m.mean, m.var, False, 0.1, 1e-5)
        return parts[0], parts[1]

    found = read(Network(function), torch.ones(1, 4, 3, 3).double())
    assert isinstance(found.of("getitem"), Scaled)
    assert found.of("getitem_1") is None
    assert found.of("native_batch_norm_default") is None

    def result(m, x, y):
        return torch.ops.aten.native_batch_norm.default(x, None, None, m.mean, m.var, False, 0.1, 1e-5)[0]

    found = read(Network(result), torch.ones(1, 4, 3, 3).double())
    assert found.of("native_batch_norm_default") == Passage()


def test_an_exported_graph_means_the_same():
    network = Network(conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4), drop=nn.Dropout())

    def function(m, x, y):
        return m.drop(m.norm(m.conv(x))) * m.image + F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1] + 2

    network.function = function
    x = torch.randn(2, 4, 5, 6).double()
    found = read(torch.export.export(network, (x, x)).module(), x)
    kinds = [type(said).__name__ for said in found.meanings.values() if said is not None]
    expected = "Through, Scaled, Same, Scaled, Through, Through, Through, Sum, Scaled"
    assert ", ".join(kinds) == expected
    check(found, x, x)


OVER = [
    lambda v, x: v.expand_as(x),
    lambda v, x: v.expand(x.shape),
    lambda v, x: v.expand(x.shape[0], 4, x.shape[2], x.shape[3]),
    lambda v, x: v.expand(x.shape[0], -1, -1, -1),
    lambda v, x: torch.broadcast_to(v, x.size()),
    lambda v, x: v.repeat(x.shape[0], 1, x.shape[2], x.shape[3]),
    lambda v, x: torch.tile(v, (1, 1, x.shape[2], 1)),
    lambda v, x: aten.tile.default(v, [1, 1, x.shape[2], 1]),
    lambda v, x: aten.expand.default(v, [x.shape[0], -1, -1, -1]),
    lambda v, x: v[0].expand_as(x),
]
WITH = {
    "mul": (lambda x, v: x * v, lambda x, v: v * x),
    "add": (lambda x, v: x + v, lambda x, v: v + x),
    "sub": (lambda x, v: x - v, lambda x, v: v - x),
    "div": (lambda x, v: x / v,),
}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    ("name", "which"), [(name, which) for name, ways in WITH.items() for which in range(len(ways))]
)
def test_a_constant_for_each_place_is_one_per_channel(over, name, which):
    """``x * v.expand_as(x) = x * v``: broadcasting does the same."""

    def function(m, x, y):
        return WITH[name][which](x, over(m.image, x))

    found = meaning_at(function, SHAPES)
    assert isinstance(found, Scaled) and (found.input, found.axis) == ("x", 1)
    assert type(found.by) is type(plainly(name, which).by)


@cache
def plainly(name, which):
    return meaning_at(lambda m, x, y: WITH[name][which](x, m.image), SHAPES)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: x * m.image.expand_as(torch.cat([y, y], 2))[:, :, : x.shape[2]],
        lambda m, x, y: x * m.image.expand(1, 4, x.shape[2], 1) * 0 + x.flip(1) * m.image.sum().expand(x.shape[2:]),
        lambda m, x, y: m.image.expand_as(x) / x,
        lambda m, x, y: x[..., :1] * m.image.expand_as(y),
    ],
)
def test_what_makes_the_result_larger_is_no_constant_over_it(function):
    assert not isinstance(meaning_at(function, SHAPES), Scaled)
