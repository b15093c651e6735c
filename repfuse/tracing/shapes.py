"""The shape and dtype of every value of a graph, for an example of the inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfuse.errors import RepfuseError
from repfuse.ops import meaning_of
from repfuse.ops.meaning import Combined, Convolved, Normed, inputs_of
from repfuse.tracing.skeleton import first_line

Shapes = dict[fx.Node, tuple[tuple[int, ...], torch.dtype]]


def record_shapes(graph: fx.Graph, module: nn.Module, example_inputs: Sequence[Any], *, stateful: bool) -> Shapes:
    """Run the graph of ``module`` on the example, without the arithmetic whose shapes are known.

    ``stateful`` says that the run may change what it runs on: then it runs on a copy. Raises RepfuseError where the
    model does not run on the example.
    """
    try:
        runner = copy.deepcopy(module) if stateful else module
        return _Recorder(graph, runner).record(copy.deepcopy(tuple(example_inputs)))
    except Exception as error:
        raise RepfuseError(
            f"The model does not run on the example input {_text(example_inputs)}.",
            f"{type(error).__name__}: {first_line(error)}",
            "Give the shape that the model expects with --input, for example --input 1x3x224x224.",
        ) from error


def _text(inputs: Sequence[Any]) -> str:
    return ", ".join("x".join(map(str, x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor.

    The operators that the planner knows are not run: empty tensors of the right shape stand for their results. Tensors
    on the meta device would do without any arithmetic, but PyTorch's way to them imports its compiler, which takes a
    second.
    """

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        super().__init__(module, graph=graph)
        self.shapes: Shapes = {}

    @torch.no_grad()
    def record(self, inputs: Sequence[Any]) -> Shapes:
        self.run(*inputs)
        return self.shapes

    def run_node(self, n: fx.Node) -> Any:
        result = self._known(n)
        if result is None:
            result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = (tuple(result.shape), result.dtype)
        return result

    def _known(self, node: fx.Node) -> Tensor | None:
        """Return an empty tensor in the shape of the node; None where that takes running it."""
        meaning = meaning_of(node, self.module)
        operands = [self.env[x] for x in inputs_of(meaning)]
        if not operands or not all(isinstance(x, Tensor) for x in operands):
            return None
        x: Tensor = operands[0]
        if isinstance(meaning, Convolved):
            return self._convolved(x, meaning)
        if isinstance(meaning, Normed) and x.dim() > 2 and x.shape[1] == self._shape(meaning.normalisation.mean)[0]:
            return x.new_empty(x.shape)
        alike = len({(other.shape, other.dtype) for other in operands}) == 1
        if isinstance(meaning, Combined) and len(operands) > 1 and alike:
            return x if meaning.in_place else x.new_empty(x.shape)
        return None

    def _convolved(self, x: Tensor, meaning: Convolved) -> Tensor | None:
        geometry = meaning.convolution.geometry
        if x.dim() != geometry.ndim + 2 or x.shape[1] != geometry.in_channels or geometry.padding_mode != "zeros":
            return None
        size = geometry.output_size(tuple(x.shape[2:]))
        weight = self.fetch_attr(meaning.convolution.weight)
        if min(size) < 1 or weight.dtype != x.dtype:
            return None
        return x.new_empty((x.shape[0], geometry.out_channels, *size))

    def _shape(self, name: str) -> torch.Size:
        tensor: Tensor = self.fetch_attr(name)
        return tensor.shape
