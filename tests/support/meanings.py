"""What a node of a small network means, in names; and the same meaning in numbers, by plain torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Convolution, Factor, Filter, Normalisation, Offset, Phases
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.explanations import REFUSALS
from repfuse.ops.meaning import Meaning, Passage, Rearranged, Same, Unfusible
from repfuse.ops.table import meaning_of
from repfuse.recording.arguments import Arguments
from repfuse.recording.constants import lookup
from repfuse.recording.recording import Recording, record

Function = Callable[[Any, Any, Any], Any]

SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(8,), (7,), (5,), (4,)],
    2: [(8, 7), (7, 6), (5, 5), (4, 4)],
    3: [(6, 5, 7), (5, 6, 4), (4, 4, 4)],
}
"""Spatial sizes: the first is the example, the others must agree with what the meaning says."""


class Network(nn.Module):
    """Runs ``function(self, x, y)`` beside tensors of many shapes, for x with the channels of ``example``."""

    def __init__(self, function: Function | None = None, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.example: tuple[int, ...] = ()
        shapes = {
            "kernel1": (6, 4, 3),
            "kernel2": (6, 4, 3, 3),
            "grouped2": (6, 2, 3, 1),
            "kernel3": (6, 4, 3, 3, 3),
            "spread1": (4, 6, 3),
            "spread2": (4, 6, 3, 3),
            "spread3": (4, 6, 3, 3, 3),
            "spread_groups": (4, 2, 3, 1),
            "bias": (6,),
            "matrix": (5, 4),
            "matrix_bias": (5,),
            "gamma": (4,),
            "beta": (4,),
            "image": (1, 4, 1, 1),
            "column": (4, 1, 1),
            "single": (1,),
            "scalar": (),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64) + 2))
        self.register_buffer("mean", torch.randn(4, dtype=torch.float64))
        self.register_buffer("var", torch.rand(4, dtype=torch.float64) + 0.5)
        for name, child in children.items():
            self.add_module(name, child.double().eval())
            for norm in child.modules():
                if getattr(norm, "running_mean", None) is not None:
                    nn.init.normal_(norm.running_mean)
                    nn.init.uniform_(norm.running_var, 0.5, 2)
                    if norm.weight is not None:
                        nn.init.normal_(norm.weight)
                        nn.init.normal_(norm.bias)

    def forward(self, x: Any, y: Any) -> Any:
        with torch._C.DisableTorchFunction():  # no recording sees it
            if any(z.shape[axis] != n for axis, n in channels(self.example) for z in (x, y)):
                raise ValueError("other channels")
        return self.function(self, x, y)


def channels(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the axes that may hold channels, with their sizes: fours, as most networks here have, else axis 1."""
    axes = list(enumerate(shape))[1:]
    return [(axis, n) for axis, n in axes if n == 4] or axes[:1]


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # A later operation in place must not change what was recorded.
        self.values[n] = result.clone() if isinstance(result, Tensor) else result
        return result


@dataclasses.dataclass
class Read:
    """A recorded network, and what its nodes mean at the example."""

    network: nn.Module
    recording: Recording
    meanings: dict[fx.Node, Meaning | None]

    @property
    def result(self) -> fx.Node:
        return next(node for node in self.recording.graph.nodes if node.op == "output").args[0]

    @property
    def meaning(self) -> Any:
        """What the returned node means, with names for nodes."""
        return named(self.meanings[self.result])

    def of(self, name: str) -> Any:
        return next(named(meaning) for node, meaning in self.meanings.items() if node.name == name)

    def run(self, x: Tensor, y: Tensor) -> dict[fx.Node, Any]:
        recorder = _Recorder(self.network, self.recording.graph)
        given = {"x": x, "y": y}
        recorder.run(*(given[node.target].clone() for node in self.recording.nodes if node.op == "placeholder"))
        return recorder.values


def read(network: nn.Module, x: Tensor, y: Tensor | None = None) -> Read:
    """Record the network and find what each node means."""
    if isinstance(network, Network):
        network.example = tuple(x.shape)
    recording = record(network, Arguments((x, x.clone() if y is None else y)))
    return Read(network, recording, {node: meaning_of(node, recording) for node in recording.nodes})


def meaning(function: Function, shape: Sequence[int], **children: nn.Module) -> Any:
    """Return what the result of ``function`` means at an input of this shape, checked in numbers at that shape."""
    return meaning_at(function, [shape], **children)


def meaning_at(function: Function, shapes: Sequence[Sequence[int]], **children: nn.Module) -> Any:
    """Return what the result means at the first shape, and check that it is so in numbers at all of them."""
    torch.default_generator.manual_seed(0)
    example, *_ = inputs = [torch.randn(tuple(shape), dtype=torch.float64) for shape in shapes]
    found = read(Network(function, **children), example, example.flip(0) + 1)
    for x in inputs:
        check(found, x, x.flip(0) + 1)
    return found.meaning


def check(found: Read, x: Tensor, y: Tensor) -> None:
    """Compare every meaning of the graph with what its node computes from ``x`` and ``y``."""
    values, tensor = found.run(x, y), lookup(found.network, found.recording.constants)
    for node, said in found.meanings.items():
        if isinstance(said, Unfusible):
            assert said.code in REFUSALS
        if said is None or isinstance(said, Passage | Unfusible):
            continue
        if isinstance(said, Rearranged):
            check_rearranged(node, said, values)
            continue
        computed, wanted = evaluate(said, values, tensor), values[node]
        counts = not wanted.is_floating_point()  # how often a normalisation was updated
        torch.testing.assert_close(computed, wanted, rtol=1e-12, atol=1e-12, check_dtype=not counts)


def check_rearranged(node: fx.Node, said: Rearranged, values: dict[fx.Node, Any]) -> None:
    """A map of channels before the node is the same map after it, for every place that they may be in."""

    def run(x: Tensor) -> Tensor:
        known: dict[fx.Node, Any] = {said.input: x}

        def again(node: fx.Node) -> Any:
            if node not in known:
                known[node] = _called(node, again) if node.op.startswith("call") else values[node]
            return known[node]

        return again(node)

    x, y = values[said.input], values[node]
    for axis, place in said.moves:
        if said.channels:
            numbers = torch.randn(2, y.shape[place], dtype=x.dtype)
            scale, shift = (n.view(-1, *[1] * (y.dim() - 1 - place)) for n in numbers)
            after = y * scale + shift
            scale, shift = (n[list(said.channels)].view(-1, *[1] * (x.dim() - 1 - axis)) for n in numbers)
            before = x * scale + shift
        else:
            channels = x.shape[axis]
            weight, bias = torch.randn(channels, channels, dtype=x.dtype), torch.randn(channels, dtype=x.dtype)
            before, after = (
                F.linear(z.movedim(at, -1), weight, bias).movedim(-1, at) for z, at in ((x, axis), (y, place))
            )
        torch.testing.assert_close(run(before.contiguous()), after, rtol=1e-12, atol=1e-12)


def _called(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def named(value: Any) -> Any:
    """Replace nodes by their names."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        return tuple(map(named, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value)(**{field.name: named(getattr(value, field.name)) for field in fields})
    return value


@torch.no_grad()
def evaluate(said: Meaning, values: dict[fx.Node, Any], tensor: Callable[[str], Tensor]) -> Tensor:
    """Compute what a meaning says."""
    match said:
        case Through(x, Convolution(geometry, weight, bias, order)):
            matrix = tensor(weight).permute(order).reshape(geometry.weight_shape) if order else tensor(weight)
            return _convolved(values[x], geometry, matrix, None if bias is None else tensor(bias))
        case Through(x, Filter(TransposedGeometry() as geometry, value)):
            return _convolved(values[x], geometry, torch.full(geometry.weight_shape, value, dtype=torch.float64), None)
        case Through(x, Filter(geometry, value, fill)):
            amount = tensor(fill).view(-1, *[1] * geometry.ndim) if isinstance(fill, str) else fill
            moved = values[x] - amount if geometry.padding_mode == "zeros" else values[x]
            padded = _padded(moved, geometry) + (amount if geometry.padding_mode == "zeros" else 0)
            weight = torch.full(geometry.weight_shape, value, dtype=torch.float64)
            return _valid(padded, geometry, weight, None)
        case Through(x, Phases(geometry, order)):
            taps = itertools.product(*map(range, geometry.kernel))
            steps = [
                tuple(slice(start, None, step) for start, step in zip(tap, geometry.stride, strict=True))
                for tap in taps
            ]
            phases = torch.stack([values[x][(..., *each)] for each in steps], 2).flatten(1, 2)
            return phases[:, list(order)] if order else phases
        case Scaled(x, by, axis):
            return _rescaled(values[x], by, axis, tensor)
        case Sum():
            terms = [evaluate(t, values, tensor) if isinstance(t, Scaled) else values[t] for t in said.inputs]
            return torch.stack(terms).sum(0)
        case Selected(x, indices, axis):
            return values[x].index_select(axis, torch.tensor(indices))
        case Joined(inputs, axis):
            return torch.cat([values[x] for x in inputs], axis)
        case Same(x):
            return values[x]
    raise AssertionError(said)


def _rescaled(x: Tensor, by: Any, axis: int | None, tensor: Callable[[str], Tensor]) -> Tensor:
    def along(value: float | str | None) -> Any:
        if not isinstance(value, str):
            return value
        flat = tensor(value).flatten()
        assert axis is not None or flat.numel() == 1
        return flat.view([-1 if place == axis else 1 for place in range(x.dim())]) if axis is not None else flat[0]

    match by:
        case Normalisation(mean, var, weight, bias, eps):
            scaled = (x - along(mean)) / (along(var) + eps).sqrt()
            return scaled * (1 if weight is None else along(weight)) + (0 if bias is None else along(bias))
        case Factor(factor, inverse, times):
            return times * (x / along(factor) if inverse else x * along(factor))
        case Offset(shift, factor, scale):
            return along(scale) * x + factor * along(shift)
    raise AssertionError(by)


def _convolved(x: Tensor, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(geometry, TransposedGeometry):
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[geometry.ndim - 1]
        padding, extra = [before for before, _ in geometry.padding], geometry.output_padding
        return convolve(x, weight, bias, geometry.stride, padding, extra, geometry.groups, geometry.dilation)
    return F.linear(x, weight, bias) if geometry.ndim == 0 else _valid(_padded(x, geometry), geometry, weight, bias)


def _padded(x: Tensor, geometry: Geometry) -> Tensor:
    amounts = [amount for pair in reversed(geometry.padding) for amount in pair]
    return F.pad(x, amounts, "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode)


def _valid(x: Tensor, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[geometry.ndim - 1]
    return convolve(x, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)
