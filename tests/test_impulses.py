"""Each fused convolution has the kernel that the original's own operations show to impulses, and no other one passes.

The oracle, ``support.impulses``, shares no code with the algebra. All is in float64, so that what is stored is what was
computed.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blocks import CASES, C, Spelled, SpelledOfTwo, conv, norm, rows, space
from blocks.costly import WIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from support import impulses
from support.agreement import image, randomised
from support.impulses import TOLERANCE, NotAffine, disagreement, layer_of, read, scaling, show_every_tap, sizes_for
from torch import nn
from torch.nn import functional as F

from repfuse.checking.places import places
from repfuse.planning.planner import plan
from repfuse.plans import Policy
from repfuse.rewriting import rewrite


def convolution_or_linear(fused, path):
    """The layer of a site, behind its pads."""
    found = fused.get_submodule(path)
    return found[-1] if isinstance(found, nn.Sequential) else found


class Asked:
    """What the original's operations in one place answer, for each source with the others at zero, at several sizes.

    A source is a tensor ``[N, C, *size]`` here; in the graph a linear layer has its channels last, and there may be no
    batch axis.
    """

    def __init__(self, place, fused):
        self.place, self.before = place, place.before
        layer = convolution_or_linear(fused, place.path)
        shapes = [place.planner.recording.shape_of[source] for source in place.sources]
        self.last = isinstance(layer, nn.Linear)
        self.ndim = max(0, len(shapes[0]) - 2) if self.last else layer.weight.dim() - 2
        self.batched = len(shapes[0]) == self.ndim + 2
        self.channels = [shape[-1 if self.last else self.batched] for shape in shapes]
        self.seen = [self._read(index, fused) for index in range(len(shapes))]

    def disagreement(self, fused):
        """By how much the modules of a fused network in this place are something else."""
        return max(self._disagreements(fused))

    def differs(self, fused):
        """Whether they are something else. It is shown at a small size, mostly, and then no larger one is asked."""
        return any(found > TOLERANCE for found in self._disagreements(fused))

    def _disagreements(self, fused):
        for index, seen in enumerate(self.seen):
            layers = self._layers(index, fused)
            for size, answers in sorted(seen.items(), key=lambda each: len(each[1])):
                yield disagreement(answers, layers, size)

    def _layers(self, index, fused):
        """What stands for one source; the biases add up, so the first has those of the other sources too."""
        own, others = [], []
        for group in self.place.region.groups:
            number = self.place.sources.index(group.source)
            written = self.place.written.get(id(group))
            if written is None:
                layer = scaling(group.of_source, self.channels[number], self.ndim)
            else:
                layer = layer_of(fused.get_submodule(written.path), self.ndim)
            if group.span:
                layer = among(layer, *group.span, self.place.region.groups[-1].span[1])
            (own if number == index else others).append(layer)
        return [replace(own[0], bias=own[0].bias + sum(layer.bias for layer in others)), *own[1:]]

    def _read(self, index, fused):
        layers, found = self._layers(index, fused), {}
        for size in sizes_for(layers):
            try:
                found[size] = read(lambda x: self._run(index, x), self.channels[index], size)
            except RuntimeError:  # most operations have a size below which they do not run
                continue
        assert any(show_every_tap(layers, size) for size in found)
        return found

    def _run(self, index, x):
        given = [x.new_zeros(len(x), channels, *x.shape[2:]) for channels in self.channels]
        given[index] = x.clone()  # the operations may write into it
        given = [source.movedim(1, -1) if self.last else source for source in given]
        if self.batched:
            y = self.before(*given)
        else:
            y = torch.stack([self.before(*sample) for sample in zip(*given, strict=True)])
        return y.movedim(-1, 1) if self.last else y


def among(layer, start, stop, channels):
    """The layer as one of ``channels`` outputs, of which the others are 0."""
    weight = layer.weight.new_zeros(channels, *layer.weight.shape[1:])
    bias = layer.bias.new_zeros(channels)
    weight[start:stop], bias[start:stop] = layer.weight, layer.bias
    return replace(layer, weight=weight, bias=bias)


def one_weight(layer):
    largest = layer.weight.abs() == layer.weight.abs().max()
    layer.weight.data[largest] *= 1 + 1e-6


def shifted(layer):
    assert layer.weight.dim() > 2
    layer.weight.data = layer.weight.data.roll(1, -1)


def channels_swapped(layer):
    layer.weight.data = layer.weight.data.flip(1 if layer.weight.shape[1] > 1 else 0)


def outputs_exchanged(layer):
    layer.weight.data = layer.weight.data.roll(1, 0)
    layer.bias.data = layer.bias.data.roll(1, 0)


def one_bias(layer):
    largest = layer.bias.abs() == layer.bias.abs().max()
    layer.bias.data[largest] *= 1 + 1e-6


def no_bias(layer):
    layer.bias.data.zero_()


def other_border(layer):
    assert any(layer.padding) and layer.padding_mode == "zeros" and not layer.transposed
    layer.padding_mode = "replicate"


def more_padding(layer):
    layer.padding = tuple(p + 1 for p in layer.padding)


def dilated(layer):
    """As large an output, from taps further apart."""
    assert max(layer.kernel_size) > 1
    layer.dilation = tuple(d + 1 for d in layer.dilation)
    layer.padding = tuple(p + (k - 1) // 2 for p, k in zip(layer.padding, layer.kernel_size, strict=True))


DAMAGES = (
    one_weight,
    shifted,
    channels_swapped,
    outputs_exchanged,
    one_bias,
    no_bias,
    other_border,
    more_padding,
    dilated,
)


def damaged(fused, path):
    """Yield copies with each damage that applies and changes something."""
    for damage in DAMAGES:
        wrong = copy.deepcopy(fused)
        layer = convolution_or_linear(wrong, path)
        before = copy.deepcopy(layer)
        try:
            damage(layer)
        except (AssertionError, AttributeError, TypeError):
            continue
        same = torch.equal(layer.weight, before.weight) and torch.equal(layer.bias, before.bias)
        if not same or layer.extra_repr() != before.extra_repr():
            yield damage.__name__, wrong


def check(model, example, policy=Policy.COST):
    """Check every site of a network, and that it is seen where one of them is damaged; return how many there are."""
    found = plan(model, example, policy)
    fused = rewrite(model, found)
    checked = []
    for place in places(model, found):
        asked = Asked(place, fused)
        assert asked.disagreement(fused) <= TOLERANCE, place.path
        for path in (written.path for written in place.written.values()):
            seen = {name: asked.differs(network) for name, network in damaged(fused, path)}
            assert len(seen) >= 2 and all(seen.values()), (path, seen)
            checked.append(path)
    assert sorted(checked) == sorted(site.path for site in found.sites)
    return len(checked)


IN_PLACE = [
    row for row in CASES if row not in (*rows.CASES, *space.MOVED) and not row.name.endswith("a channel of ones")
]
"""Impulses show a kernel where its rows stay; those that move are checked by a matrix, see test_rows. A channel of ones
is no kernel of the source alone: beyond the border it is 0, which impulses on a plane have none of."""

SAMPLE = {row.name for row in IN_PLACE[::10] if row.channels < WIDE}
"""Those of many channels take seconds, for as many impulses."""


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=() if r.name in SAMPLE else pytest.mark.slow) for r in IN_PLACE]
)
def test_every_block_has_the_kernels_that_impulses_show(row):
    torch.default_generator.manual_seed(0)
    assert check(randomised(row.make()), row.at(row.side), row.policy) == row.sites


def of_two(m, x, y):
    return (m.a(x) + m.c(y)) + (m.b(x) + m.d(y))


def summed(m, x):
    return m.a(x) + m.b(x)


def two_linears():
    return Spelled(summed, a=nn.Linear(C, 5), b=nn.Linear(C, 5))


LAYOUTS = {
    "a vector": (two_linears, [(C,)]),
    "vectors": (two_linears, [(2, C)]),
    "vectors in rows": (two_linears, [(2, 3, 7, C)]),
    "written into its input": (
        lambda: nn.Sequential(nn.ReLU(), Spelled(lambda m, x: x.add_(m.a(x)), a=conv(3)), nn.ReLU()),
        [(1, C, 5, 6)],
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(C, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6)),
        [(1, C, 5, 6)],
    ),
    "padded aside": (
        lambda: Spelled(summed, a=nn.Sequential(nn.ZeroPad2d((2, 0, 0, 2)), conv(3, padding=0)), b=conv(1)),
        [(1, C, 6, 5)],
    ),
    "two sources": (
        lambda: SpelledOfTwo(of_two, a=conv(), b=conv(1), c=conv(), d=conv(1)),
        [(1, C, 9, 8), (1, C, 9, 8)],
    ),
    **{
        mode: (lambda mode=mode: nn.Sequential(conv(5, padding_mode=mode), norm()), [(1, C, 9, 8)])
        for mode in ("reflect", "replicate", "circular")
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_whatever_the_layout_of_a_place(name):
    make, shapes = LAYOUTS[name]
    example = [image(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    assert check(randomised(make()), example) == len(shapes)


@st.composite
def settings_of_convolutions(draw):
    ndim = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    most = 5 if ndim < 3 else 3
    apart = 3 if ndim < 3 else 2  # a plane of each impulse is large enough
    axis = [
        (st.integers(1, most), st.integers(1, apart), st.integers(0, 3), st.integers(1, apart)) for _ in range(ndim)
    ]
    kernel, stride, padding, dilation = zip(*(tuple(map(draw, one)) for one in axis), strict=True)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return channels, kernel, stride, padding, dilation, groups, draw(st.booleans())


def check_read(module, channels, ndim):
    """Check that what PyTorch answers is what the oracle says of the layer, at every size that it takes."""
    layer = layer_of(module, ndim)
    for size in sizes_for([layer]):
        try:
            seen = read(module, channels, size)
        except RuntimeError:
            assert not show_every_tap([layer], size)
        else:
            assert disagreement(seen, [layer], size) <= TOLERANCE


@given(settings_of_convolutions())
@settings(max_examples=25)
def test_the_oracle_knows_what_a_convolution_is(given):
    (into, out), kernel, stride, padding, dilation, groups, bias = given
    kind = impulses.CONVOLUTIONS[len(kernel) - 1]
    check_read(randomised(kind(into, out, kernel, stride, padding, dilation, groups, bias)), into, len(kernel))


@given(settings_of_convolutions())
@settings(max_examples=15)
def test_the_oracle_knows_what_a_transposed_convolution_is(given):
    (into, out), kernel, stride, padding, dilation, groups, bias = given
    padding = tuple(min(p, d * (k - 1) // 2) for p, d, k in zip(padding, dilation, kernel, strict=True))
    kind = impulses.TRANSPOSED[len(kernel) - 1]
    check_read(randomised(kind(into, out, kernel, stride, padding, 0, groups, bias, dilation)), into, len(kernel))


NOT_AFFINE = {
    "relu": F.relu,
    "softmax": lambda x: x.softmax(1),
    "almost linear": lambda x: x + 1e-9 * x.abs(),
    "clamped": lambda x: x.clamp(-1e4, 1e4),
    "another branch for large values": lambda x: x if float(x.abs().amax()) < 1e4 else 2 * x,
    "not a number": lambda x: x / 0,
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_affine_is_seen(name):
    with pytest.raises(NotAffine):
        read(NOT_AFFINE[name], C, (5, 6))


@pytest.mark.parametrize("padding", [0, 1])
def test_what_differs_at_the_border_alone_is_seen(padding):
    """A bias before a padding: the kernel that is right in the middle is wrong where there are zeros around."""
    first, second = randomised(conv(1)), randomised(conv(3, padding=padding), seed=1)
    merged = randomised(conv(3, padding=padding))
    merged.weight.data = torch.einsum("oc...,ci->oi...", second.weight.data, first.weight.data.flatten(1))
    merged.bias.data = second.bias.data + second.weight.data.sum((2, 3)) @ first.bias.data
    seen = read(nn.Sequential(first, second), C, (5, 6))
    assert (disagreement(seen, [layer_of(merged, 2)], (5, 6)) <= TOLERANCE) == (padding == 0)


def test_the_oracle_uses_nothing_of_what_it_checks():
    nodes = list(ast.walk(ast.parse(Path(impulses.__file__).read_text())))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not [name for name in imported if name.startswith("repfuse") or name.endswith("functional")]
    functions = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = {called.attr if isinstance(called, ast.Attribute) else called.id for called in functions}
    assert not [name for name in names if name.startswith(("conv", "unfold", "fold", "linear", "matmul"))]
