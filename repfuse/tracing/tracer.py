"""Symbolic tracing that also records the call of every module: which nodes it made, from what, and what it gave."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict


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


class CallTracer(fx.Tracer):
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

    # The methods below are hooks of torch.fx.Tracer, which says when they are called.

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]  # noqa: D102
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

    def proxy(self, node: fx.Node) -> fx.Proxy:  # noqa: D102
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: D102
        return module_qualified_name in self.leaves or is_stock(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: D102
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

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: D102
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
