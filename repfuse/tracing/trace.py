"""module -> graph, with the shape of every value and the call of every module that made it.

A copy is traced whose tensors are on the meta device: it costs no memory, and whatever a stateful block does to
itself while it is traced cannot reach the module that was given.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.networks import same_randomness, stored_tensors
from repfuse.tracing.arguments import Arguments, has_tensor, is_mixed
from repfuse.tracing.constants import Constants
from repfuse.tracing.leaves import is_stock
from repfuse.tracing.shapes import Shapes, record_in_full, record_shapes
from repfuse.tracing.skeleton import copy_with, meta_copy
from repfuse.tracing.tracer import Call, CallTracer
from repfuse.tracing.watching import Watched, in_terms_of, watching
from repfuse.wording import described, first_line


@dataclass(eq=False)
class Traced:
    """The graph of a module.

    ``module`` is the copy that was traced, without data; ``call_of`` and ``shape_of`` say where each node was made and
    what shape it has at the example; ``constants`` are the values that are computed from parameters and buffers alone;
    ``opaque`` are the modules that could not be traced through, and why, and ``seen`` what these did when they ran.
    """

    module: nn.Module
    graph: fx.Graph
    call_of: dict[fx.Node, Call]
    calls: dict[str, list[Call]]
    shape_of: dict[fx.Node, tuple[int, ...]]
    dtype_of: dict[fx.Node, torch.dtype]
    constants: Constants
    opaque: dict[str, str] = field(default_factory=dict)
    seen: Watched = field(default_factory=Watched)

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


class Untraceable(Exception):
    """The outermost forward cannot be traced."""


class DoesNotRun(Exception):
    """The module does not take the example."""


def trace(module: nn.Module, arguments: Arguments) -> Traced:
    """Trace ``module``. What cannot be traced through stays one node, the innermost module that fails.

    Raises Untraceable where that is ``module`` itself, and DoesNotRun where it does not take the arguments.
    """
    skeleton = meta_copy(module)
    for norm in skeleton.modules():
        if isinstance(norm, _BatchNorm) and (norm is skeleton or not is_stock(norm)):
            norm._check_input_dim = _accept  # type: ignore[method-assign]
    values = _values(skeleton, arguments)
    with same_randomness(module):
        try:
            return _traced(module, skeleton, values, unrolls=True)
        except _OtherPieces:
            return _traced(module, skeleton, values, unrolls=False)


def run_untraced(module: nn.Module, arguments: Arguments) -> Watched:
    """Run a module whose own forward cannot be traced, and return what it did. Raises DoesNotRun where it fails."""
    runner = copy_with(module, {})
    given = copy.deepcopy(arguments)
    try:
        with torch.no_grad(), same_randomness(runner), watching([runner]) as watched:
            runner(*given.args, **given.kwargs)
    except Exception as error:
        raise DoesNotRun(described(error)) from error
    return in_terms_of(module, runner, watched)


class _OtherPieces(Exception):
    """A loop over the pieces of a tensor was followed, and they were not as many as asked for."""


def _values(module: nn.Module, arguments: Arguments) -> dict[str, Any]:
    try:
        values = arguments.by_parameter(module)
    except TypeError as error:
        raise DoesNotRun(first_line(error)) from error
    if mixed := [name for name, value in values.items() if is_mixed(value)]:
        raise Untraceable(f"the argument {mixed[0]!r} holds tensors and other things")
    return values


def _traced(module: nn.Module, skeleton: nn.Module, values: dict[str, Any], *, unrolls: bool) -> Traced:
    fixed = {name: value for name, value in values.items() if not has_tensor(value) and not name.startswith("*")}
    inputs = [x for name, value in values.items() for x in (value if name.startswith("*") else (value,))]
    opaque: dict[str, str] = {}
    while True:
        tracer = CallTracer(frozenset(opaque), module, unrolls=unrolls)
        try:
            graph = tracer.trace(skeleton, fixed or None)
            break
        except Exception as error:
            path, why = tracer.failed or "", described(error)
            if not path:
                raise Untraceable(why) from error
            opaque[path] = why
    try:
        shapes, seen = _run(graph, module, inputs, tracer.constants, opaque)
    except Exception as error:
        if tracer.unrolled:
            raise _OtherPieces from error
        raise DoesNotRun(described(error)) from error
    constants, calls = tracer.constants, tracer.calls
    return Traced(skeleton, graph, tracer.call_of, calls, shapes.shape_of, shapes.dtype_of, constants, opaque, seen)


def _run(
    graph: fx.Graph, module: nn.Module, inputs: list[Any], constants: Constants, opaque: Collection[str]
) -> tuple[Shapes, Watched]:
    if not opaque:
        changes = any(part.training for part in module.modules()) or constants.may_change
        return record_shapes(graph, module, inputs, constants, copies=changes), Watched()
    runner = copy_with(module, {})
    with watching([runner.get_submodule(path) for path in opaque]) as watched:
        shapes = record_in_full(graph, runner, inputs, constants)
    return shapes, in_terms_of(module, runner, watched)


def _accept(_input: Any) -> None:
    """Stand in for the check of a normalisation's input, a branch on its shape, which cannot be traced."""
