"""The shape and dtype of every value of a graph, for an example of the inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfuse.algebra.layers import Convolution, Normalisation
from repfuse.ops import meaning_of
from repfuse.ops.meaning import Applied, Combined, Rescaled, inputs_of
from repfuse.ops.scope import Scope
from repfuse.tracing.constants import Constants
from repfuse.tracing.skeleton import copy_with


@dataclass
class Shapes:
    """The shape and dtype of every node that is a tensor."""

    shape_of: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    dtype_of: dict[fx.Node, torch.dtype] = field(default_factory=dict)


def record_shapes(
    graph: fx.Graph, module: nn.Module, inputs: Sequence[Any], constants: Constants, *, copies: bool
) -> Shapes:
    """Run the graph of ``module`` on a value for each placeholder, without the arithmetic whose shapes are known.

    With ``copies`` it runs on a copy, since the run may change what it runs on.
    """
    runner = copy_with(module, {}) if copies else module
    return _Recorder(graph, runner, constants).record(copy.deepcopy(tuple(inputs)))


def record_in_full(graph: fx.Graph, module: nn.Module, inputs: Sequence[Any], constants: Constants) -> Shapes:
    """Run the graph as ``record_shapes`` does, on ``module`` itself, all of it: some module may decide by values."""
    return _Recorder(graph, module, constants, in_full=True).record(copy.deepcopy(tuple(inputs)))


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor.

    The operators that the planner knows are not run: empty tensors of the right shape stand for their results. Tensors
    on the meta device would do without any arithmetic, but PyTorch's way to them imports its compiler, which takes a
    second.
    """

    def __init__(self, graph: fx.Graph, module: nn.Module, constants: Constants, *, in_full: bool = False) -> None:
        super().__init__(module, graph=graph)
        self.in_full = in_full
        self.shapes = Shapes()
        self.scope = Scope(module, constants, self.shapes.shape_of)

    @torch.no_grad()
    def record(self, inputs: Sequence[Any]) -> Shapes:
        self.run(*inputs)
        return self.shapes

    def run_node(self, n: fx.Node) -> Any:
        result = None if self.in_full else self._known(n)
        if result is None:
            result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes.shape_of[n] = tuple(result.shape)
            self.shapes.dtype_of[n] = result.dtype
        return result

    def _known(self, node: fx.Node) -> Tensor | None:
        """Return an empty tensor in the shape of the node; None where that takes running it."""
        meaning = meaning_of(node, self.scope)
        inputs = inputs_of(meaning)
        if not inputs or not set(inputs) <= set(node.all_input_nodes):  # read through others: they are there, run it
            return None
        operands = [self.env[x] for x in inputs]
        if not all(isinstance(x, Tensor) for x in operands):
            return None
        x: Tensor = operands[0]
        if isinstance(meaning, Applied) and isinstance(meaning.layer, Convolution):
            return self._convolved(x, meaning.layer)
        if isinstance(meaning, Rescaled) and isinstance(meaning.by, Normalisation) and meaning.by.mean is not None:
            fits = tuple(x.shape[1:2]) == self.scope.constants.shape(meaning.by.mean)
            return x.new_empty(x.shape) if fits else None
        alike = len({(other.shape, other.dtype) for other in operands}) == 1
        if isinstance(meaning, Combined) and len(operands) > 1 and alike:
            return x if meaning.in_place else x.new_empty(x.shape)
        return None

    def _convolved(self, x: Tensor, layer: Convolution) -> Tensor | None:
        geometry, constants = layer.geometry, self.scope.constants
        if x.dim() != geometry.ndim + 2 or x.shape[1] != geometry.in_channels or geometry.padding_mode != "zeros":
            return None
        if constants.is_computed(layer.weight):
            return None
        size = geometry.output_size(tuple(x.shape[2:]))
        weight = self.fetch_attr(layer.weight)
        if min(size, default=1) < 1 or weight.dtype != x.dtype:
            return None
        return x.new_empty((x.shape[0], geometry.out_channels, *size))
