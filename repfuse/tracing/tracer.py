"""Symbolic tracing that also records the call of every module: which nodes it made, from what, and what it gave."""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.fx.proxy import TraceError

from repfuse.tracing.constants import Constants
from repfuse.tracing.leaves import is_leaf, weight_hooks
from repfuse.tracing.pieces import pieces
from repfuse.tracing.proxies import ConstantProxy, Factories, PlainTensor, Proxy, answers
from repfuse.tracing.running import NotReproducible
from repfuse.tracing.skeleton import restored


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


class CallTracer(fx.Tracer):
    """Records the call of every node, and the innermost module under way when tracing fails.

    ``leaves`` are paths of modules not to look into; ``module`` is the model with its real tensors, of which the root
    that is traced may be a copy without data. ``unrolls`` says that loops over the pieces of a tensor may be followed;
    ``unrolled``, that one was: the run on the example has to show that the pieces are as many as asked for.
    """

    def __init__(self, leaves: frozenset[str], module: nn.Module, *, unrolls: bool = True) -> None:
        super().__init__()
        self.leaves = leaves
        self.module = module
        self.unrolls = unrolls
        self.unrolled = False
        self.tensor_names: dict[int, str] = {}
        self.call_of: dict[fx.Node, Call] = {}
        self.calls: dict[str, list[Call]] = {}
        self.failed: str | None = None
        self._asked: list[tuple[fx.Node, Call]] = []
        self._own_dict: dict[Any, Any] | None = None
        self._count = 0
        self._current = self._begin("", None, (), {})

    # The methods below are hooks of torch.fx.Tracer, which says when they are called.

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]  # noqa: D102
        named = itertools.chain(root.named_parameters(), root.named_buffers())
        self.tensor_names = {id(tensor): name for name, tensor in named}
        with restored(root), Factories(self), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what forward code warns of when it meets proxies
            self._hide_plain_tensors(root)
            graph = super().trace(root, concrete_args)
        self._check_answers()
        inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
        self._current.args = inputs
        self._current.stop = self._count
        returned = next(node for node in graph.nodes if node.op == "output").args[0]
        self._current.output = returned if self._own_dict is None else self._own_dict
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Let the hooks that compute the weights of the root itself run before its forward, as they would in a call.

        What is fixed is asserted in the graph. (The stock way takes tuples apart, and loses the names of arguments.)
        """
        forward, given = super().create_args_for_root(root_fn, is_module)

        @functools.wraps(forward)
        def hooked(*args: Any) -> Any:
            for hook in weight_hooks(self.root):
                hook(self.root, args)
            return forward(*args)

        return hooked, [self._fixed(x, concrete_args or {}) for x in given]

    def _fixed(self, given: Any, values: dict[str, Any]) -> Any:
        """Return the value that the argument ``given`` has to have, with a node that sees to it; else ``given``."""
        if not isinstance(given, fx.Proxy) or str(given.node.target) not in values:
            return given
        name = str(given.node.target)
        value = values[name]
        said = f"{name} was {value!r} when the network was converted: no other value will do"
        same = operator.is_ if value is None else operator.eq
        holds = self.create_proxy("call_function", same, (given, value), {})
        self.create_proxy("call_function", torch._assert, (holds, said), {})
        return value

    def create_arg(self, a: Any) -> Any:
        """Remember a dict of another class, such as OrderedDict: the graph makes a plain dict of it."""
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict) and self._current.caller is None:
            self._own_dict = a
        if isinstance(a, Tensor) and id(a) not in self.tensor_names:
            raise TraceError("forward uses a tensor that neither belongs to a module nor is computed in the graph")
        return super().create_arg(a)

    def getattr(self, _attr: str, attr_val: Any, _cache: dict[str, fx.Proxy]) -> Any:
        """Make a node for every reading of a tensor of the model, in the forward that reads it.

        The stock way shares one node among all forwards, and searches all parameters each time.
        """
        name = self.tensor_names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        return attr_val if name is None else self.create_proxy("get_attr", name, (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:  # noqa: D102
        return ConstantProxy(node, self) if self.constants.is_pure(node) else Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: D102
        return module_qualified_name in self.leaves or is_leaf(m)

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: D102
        return bool(self.answer(obj.node)) if self.constants.is_pure(obj.node) else super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:  # noqa: D102
        if isinstance(obj, ConstantProxy):
            return answers(obj)
        count = pieces(obj.node) if self.unrolls else None
        if count is None:
            return super().iter(obj)
        self.unrolled = True
        whole: Any = obj
        return (whole[index] for index in range(count))

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

    @cached_property
    def constants(self) -> Constants:
        """What the graph, as far as it is made, computes from parameters and buffers alone."""
        return Constants(self.graph, self.module)

    def answer(self, node: fx.Node) -> Any:
        """Return the value of a constant, for forward code that decides by it.

        Raises TraceError where it is not one, here or because of what comes later in the graph.
        """
        self._asked.append((node, self._current))
        try:
            return self.constants.current(node)
        except NotReproducible as error:
            raise TraceError(str(error)) from error

    def _check_answers(self) -> None:
        for node, call in self._asked:
            if not self.constants.is_constant(node):
                self.failed = call.path
                raise TraceError(f"forward decides by the value of {node.name}, and overwrites it later")

    def _hide_plain_tensors(self, root: nn.Module) -> None:
        for path, module in root.named_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor):
                    vars(module)[name] = PlainTensor(self, f"{path}.{name}" if path else name)

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
