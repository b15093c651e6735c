"""module -> graph, with the shape of every value and the call of every module that made it.

A copy is traced whose tensors are on the meta device: it costs no memory, and whatever a stateful block does to
itself while it is traced cannot reach the module that was given.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.errors import RepfuseError
from repfuse.networks import same_randomness, stored_tensors
from repfuse.preconditions import check_traceable
from repfuse.tracing.constants import Constants
from repfuse.tracing.leaves import is_stock
from repfuse.tracing.shapes import record_shapes
from repfuse.tracing.skeleton import first_line, meta_copy
from repfuse.tracing.tracer import Call, CallTracer


@dataclass(eq=False)
class Traced:
    """The graph of a model.

    ``module`` is the copy that was traced, without data; ``call_of`` and ``shape_of`` say where each node was made and
    what shape it has at the example; ``constants`` are the values that are computed from parameters and buffers alone;
    ``opaque`` are the modules that could not be traced through, and why.
    """

    module: nn.Module
    graph: fx.Graph
    call_of: dict[fx.Node, Call]
    calls: dict[str, list[Call]]
    shape_of: dict[fx.Node, tuple[int, ...]]
    dtype_of: dict[fx.Node, torch.dtype]
    constants: Constants
    opaque: dict[str, str] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the graph, in order."""
        return list(self.graph.nodes)

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """The position of each node."""
        return {node: index for index, node in enumerate(self.nodes)}

    def fingerprint(self) -> str:
        """Return a digest of the graph and of the tensors' shapes: equal for equal models, whatever their weights."""
        digest = hashlib.sha256()
        for node in self.graph.nodes:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
            digest.update(f"{node.op} {node.name} {target} {node.args} {node.kwargs}\n".encode())
        for name, tensor in stored_tensors(self.module):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        return digest.hexdigest()


def trace(module: nn.Module, example_inputs: Sequence[Any]) -> Traced:
    """Trace ``module``. What cannot be traced through stays one node, the innermost module that fails.

    Raises RepfuseError where the model does not take the example, or the root itself cannot be traced.
    """
    check_traceable(module)
    skeleton = meta_copy(module)
    for norm in skeleton.modules():
        if isinstance(norm, _BatchNorm) and (norm is skeleton or not is_stock(norm)):
            norm._check_input_dim = _accept  # type: ignore[method-assign]
    with same_randomness(module):
        try:
            return _traced(module, skeleton, example_inputs, unrolls=True)
        except _OtherPieces:
            return _traced(module, skeleton, example_inputs, unrolls=False)


class _OtherPieces(Exception):
    """A loop over the pieces of a tensor was followed, and they were not as many as asked for."""


def _traced(module: nn.Module, skeleton: nn.Module, example_inputs: Sequence[Any], *, unrolls: bool) -> Traced:
    opaque: dict[str, str] = {}
    while True:
        tracer = CallTracer(frozenset(opaque), module, unrolls=unrolls)
        try:
            graph = tracer.trace(skeleton, _defaults(skeleton, len(example_inputs)))
            break
        except Exception as error:
            path = tracer.failed or ""
            if not path:
                raise RepfuseError(
                    f"{type(module).__name__}.forward cannot be traced symbolically.",
                    f"{type(error).__name__}: {first_line(error)}",
                    "Control flow on values in the outermost forward has to move into a submodule.",
                ) from error
            opaque[path] = f"{type(error).__name__}: {first_line(error)}"
    constants = tracer.constants
    stateful = bool(opaque) or any(part.training for part in module.modules()) or constants.may_change
    try:
        shapes = record_shapes(graph, module, example_inputs, constants, stateful=stateful)
    except RepfuseError as error:
        if tracer.unrolled:
            raise _OtherPieces from error
        raise
    return Traced(skeleton, graph, tracer.call_of, tracer.calls, shapes.shape_of, shapes.dtype_of, constants, opaque)


def _accept(_input: Any) -> None:
    """Stand in for the check of a normalisation's input, a branch on its shape, which cannot be traced."""


def _defaults(module: nn.Module, given: int) -> dict[str, Any] | None:
    """Fix the parameters of ``forward`` that the example does not give at their defaults."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    rest = [p for p in parameters[given:] if p.kind in named and p.default is not p.empty]
    return {p.name: p.default for p in rest} or None
