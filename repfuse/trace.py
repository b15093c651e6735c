"""module -> graph, with the shape of every value and the call of every module that made it.

A copy is traced whose tensors are on the meta device: it costs no memory, and whatever a stateful block does to
itself while it is traced cannot reach the module that was given.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.errors import RepfuseError


@dataclass(eq=False)
class Call:
    """One execution of a module's forward: its path, its arguments and result as graph nodes, and who called it.

    The nodes that were made while it ran are the graph's nodes from ``start`` to ``stop``.
    """

    path: str
    caller: Call | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    stop: int = 0
    output: Any = None

    def chain(self) -> Iterator[Call]:
        """Yield this call, its caller, and so on up to the root."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.caller

    def up_to(self, outer: Call) -> list[Call]:
        """Return this call and its callers below ``outer``, innermost first."""
        return list(itertools.takewhile(lambda call: call is not outer, self.chain()))


@dataclass(eq=False)
class Traced:
    """The graph of a model.

    ``module`` is the copy that was traced, without data; ``call_of`` and ``shape_of`` say where each node was made and
    what shape it has at the example; ``opaque`` are the modules that could not be traced through, and why.
    """

    module: nn.Module
    graph: fx.Graph
    call_of: dict[fx.Node, Call]
    calls: dict[str, list[Call]]
    shape_of: dict[fx.Node, tuple[int, ...]]
    dtype_of: dict[fx.Node, torch.dtype]
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
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        return digest.hexdigest()


def trace(module: nn.Module, example_inputs: Sequence[Any]) -> Traced:
    """Trace ``module``. What cannot be traced through stays one node, the innermost module that fails.

    Raises RepfuseError where the model does not take the example, or the root itself cannot be traced.
    """
    skeleton = meta_copy(module)
    for norm in skeleton.modules():
        if isinstance(norm, _BatchNorm) and not is_stock(norm):
            norm._check_input_dim = _accept  # type: ignore[method-assign]
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(frozenset(opaque))
        try:
            graph = tracer.trace(skeleton, _defaults(skeleton, len(example_inputs)))
            break
        except Exception as error:
            path = tracer.failed or ""
            if not path:
                raise RepfuseError(
                    f"{type(module).__name__}.forward cannot be traced symbolically.",
                    f"{type(error).__name__}: {_first_line(error)}",
                    "Control flow on values in the outermost forward has to move into a submodule.",
                ) from error
            opaque[path] = f"{type(error).__name__}: {_first_line(error)}"
    traced = Traced(skeleton, graph, tracer.call_of, tracer.calls, {}, {}, opaque)
    _record_shapes(traced, module, example_inputs)
    return traced


def _accept(_input: Any) -> None:
    """Stand in for the check of a normalisation's input, a branch on its shape, which cannot be traced."""


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module without its data: the same structure with every tensor on the meta device."""
    return copy_with(module, {id(tensor): _meta(tensor) for tensor in _tensors(module)})


def copy_with(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy a module with these replacements by identity. Raises RepfuseError where it cannot be copied."""
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise RepfuseError(
            f"{type(module).__name__} cannot be copied.",
            f"{type(error).__name__}: {_first_line(error)}",
            "Remove what cannot be deep-copied (old weight_norm, open handles), and save the model again.",
        ) from error


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _defaults(module: nn.Module, given: int) -> dict[str, Any] | None:
    """Fix the parameters of ``forward`` that the example does not give at their defaults."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    rest = [p for p in parameters[given:] if p.kind in named and p.default is not p.empty]
    return {p.name: p.default for p in rest} or None


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it does to a tensor, a write in place; torch.fx records ``x + y``."""

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)
    __ifloordiv__ = _in_place(operator.ifloordiv)
    __imod__ = _in_place(operator.imod)
    __ipow__ = _in_place(operator.ipow)
    __iand__ = _in_place(operator.iand)
    __ior__ = _in_place(operator.ior)
    __ixor__ = _in_place(operator.ixor)


class _Tracer(fx.Tracer):
    """Records the call of every node, and the innermost module under way when tracing fails."""

    def __init__(self, leaves: frozenset[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.tensor_names: dict[int, str] = {}
        self.call_of: dict[fx.Node, Call] = {}
        self.calls: dict[str, list[Call]] = {}
        self.failed: str | None = None
        self._own_dict: dict[Any, Any] | None = None
        self._count = 0
        self._current = self._begin("", None, (), {})

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        named = itertools.chain(root.named_parameters(), root.named_buffers())
        self.tensor_names = {id(tensor): name for name, tensor in named}
        graph = super().trace(root, concrete_args)
        inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
        self._current.args = inputs
        self._current.stop = self._count
        returned = next(node for node in graph.nodes if node.op == "output").args[0]
        self._current.output = returned if self._own_dict is None else self._own_dict
        return graph

    def create_arg(self, a: Any) -> Any:
        """Remember a dict of another class, such as OrderedDict: the graph makes a plain dict of it."""
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict) and self._current.caller is None:
            self._own_dict = a
        return super().create_arg(a)

    def getattr(self, _attr: str, attr_val: Any, _cache: dict[str, fx.Proxy]) -> Any:
        """Make a node for every reading of a tensor of the model, in the forward that reads it.

        The stock way shares one node among all forwards, and searches all parameters each time.
        """
        name = self.tensor_names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        return attr_val if name is None else self.create_proxy("get_attr", name, (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or is_stock(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        outer = self._current
        self._current = self._begin(path, outer, _nodes(args), _nodes(kwargs))
        try:
            result = forward(*args, **kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        self._current.output = _nodes(result)
        self._current.stop = self._count
        self._current = outer
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.call_of[node] = self._current
        self._count += 1
        return node

    def _begin(self, path: str, caller: Call | None, args: Any, kwargs: Any) -> Call:
        call = Call(path, caller, args, kwargs, self._count)
        self.calls.setdefault(path, []).append(call)
        return call


def _nodes(value: Any) -> Any:
    """Replace proxies by their nodes, in any nesting of tuples (named ones too), lists and dicts."""
    if isinstance(value, fx.Proxy):
        return value.node
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_nodes, value))
    if type(value) in (tuple, list):
        return type(value)(map(_nodes, value))
    if type(value) is dict:
        return {key: _nodes(entry) for key, entry in value.items()}
    return value


def is_stock(module: nn.Module) -> bool:
    """Whether calling the module runs PyTorch's own forward, so that its class says what it computes."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or "forward" in vars(module):
        return False
    forward = type(module).forward
    return (getattr(forward, "__module__", None) or "").startswith("torch.nn.modules")


def _record_shapes(traced: Traced, module: nn.Module, example_inputs: Sequence[Any]) -> None:
    """Run the graph on the meta device, or, where that is not possible, on copies of the real tensors.

    Copies, because a model in training mode or with a state of its own changes what it runs on.
    """
    try:
        inputs = [x.to("meta") if isinstance(x, Tensor) else x for x in example_inputs]
        _Shapes(traced, traced.module).run(*inputs)
    except Exception:
        try:
            _Shapes(traced, copy.deepcopy(module)).run(*copy.deepcopy(tuple(example_inputs)))
        except Exception as error:
            raise RepfuseError(
                f"The model does not run on the example input {_shapes_text(example_inputs)}.",
                f"{type(error).__name__}: {_first_line(error)}",
                "Give the shape that the model expects with --input, for example --input 1x3x224x224.",
            ) from error


def _shapes_text(inputs: Sequence[Any]) -> str:
    return ", ".join("x".join(map(str, x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor."""

    def __init__(self, traced: Traced, module: nn.Module) -> None:
        super().__init__(module, graph=traced.graph)
        self.traced = traced

    @torch.no_grad()
    def run(self, *args: Any) -> Any:  # type: ignore[override]
        return super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.traced.shape_of[n] = tuple(result.shape)
            self.traced.dtype_of[n] = result.dtype
        return result
