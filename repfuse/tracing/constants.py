"""Values that a graph computes from parameters and buffers alone: weights in all but name.

A node is constant if everything that its value depends on is: the nodes it reads and, where its memory was written in
place before it was made, the writers and what they read. A tensor of the model that any node overwrites is not, and
neither is what draws random numbers: that is watched while it is computed, not guessed from names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfuse.networks import named_tensors
from repfuse.tracing.aliases import Aliases
from repfuse.tracing.leaves import hooks_of, is_stock
from repfuse.tracing.memory import called, is_foreign
from repfuse.tracing.running import NotReproducible, reproducible, run, storage_of


class Constants:
    """The constants of one graph, which may still grow at its end; ``module`` holds the real tensors."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self.graph = graph
        self.module = module
        self._aliases = Aliases()
        self._order: dict[fx.Node, int] = {}
        self._last: fx.Node | None = None
        self._pure: set[fx.Node] = set()
        self._changing: set[int] = set()
        self._by_name: dict[str, fx.Node] = {}
        self._names: dict[fx.Node, str | None] = {}  # of the graph as it is: a later write may end a constant
        self._shapes: dict[fx.Node, tuple[int, ...] | None] = {}

    def name_of(self, value: Any) -> str | None:
        """Return the name of a node's value, if it is a tensor or number computed from parameters and buffers alone.

        ``block.weight`` for a tensor of the model as it is, ``%mul_3`` (the node's name) for a computed one. The value
        is the same for all who read the node.
        """
        if not isinstance(value, fx.Node):
            return None
        self._grow()
        if value not in self._names:
            self._names[value] = self._name(value)
        return self._names[value]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value that ``name_of`` named, or of a parameter or buffer."""
        node = self._by_name.get(name)
        shape = tuple(self._stored(name).shape) if node is None else self._shape(node)
        assert shape is not None
        return shape

    def leaves(self, name: str) -> tuple[str, ...]:
        """Return the names of the parameters and buffers that the value is computed from, each once."""
        node = self._by_name.get(name)
        if node is None:
            return (name,)
        return tuple(dict.fromkeys(str(step.target) for step in self._steps(node, node) if step.op == "get_attr"))

    def floating_leaves(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return which parameters and buffers of floating dtype the values are computed from."""
        leaves = dict.fromkeys(leaf for name in names for leaf in self.leaves(name))
        return tuple(leaf for leaf in leaves if self._stored(leaf).is_floating_point())

    def is_computed(self, name: str) -> bool:
        """Whether the value is computed in every forward, and no parameter or buffer as it is."""
        node = self._by_name.get(name)
        return node is not None and node.op != "get_attr"

    def evaluate(self, name: str, tensors: Callable[[str], Tensor]) -> Tensor:
        """Return the value, computed in float64 from the parameters and buffers that ``tensors`` gives by name.

        Where the graph itself says another dtype (``.float()``), it keeps that. The result may be a tensor of
        ``tensors`` or a view of one: it is not to be written into.
        """
        node = self._by_name.get(name)
        if node is None:
            return widened(tensors(name))
        with torch.no_grad():
            value = run(self._steps(node, node), self.module, lambda leaf: widened(tensors(leaf)))
            return torch.as_tensor(value[node])

    def _name(self, node: fx.Node) -> str | None:
        if not self._is_steady(node) or self._shape(node) is None:
            return None
        name = str(node.target) if node.op == "get_attr" else f"%{node.name}"
        self._by_name[name] = node
        return name

    @property
    def may_change(self) -> bool:
        """Whether running the graph may write into the tensors of the module, so that they are no constants then."""
        self._grow()
        leaves = (node for node in self._order if node.op == "get_attr")
        return bool(self._changing) or any(self._aliases[leaf].writers for leaf in leaves)

    def memory_of(self, node: fx.Node) -> frozenset[fx.Node]:
        """Return the nodes whose values may lie in the same memory as that of ``node``."""
        self._grow()
        return frozenset(self._aliases[node].members)

    def is_pure(self, node: fx.Node) -> bool:
        """Whether the node by itself could be constant; what else happens to its memory is not looked at."""
        self._grow()
        return node in self._pure

    def is_constant(self, node: fx.Node, stop: fx.Node | None = None) -> bool:
        """Whether the value, as it is after the node ``stop`` (the node itself, without it), is constant."""
        self._grow()
        return node in self._pure and all(map(self._is_sound, self._steps(node, stop or node)))

    def current(self, node: fx.Node) -> Any:
        """Return the value of a node as the graph leaves it so far, computed from the tensors of the module.

        Raises NotReproducible where that is not constant.
        """
        self._grow()
        assert self._last is not None
        if not self.is_constant(node, self._last):
            raise NotReproducible(f"the value of {node.name} is not computed from parameters and buffers alone")
        return self._watched(self._steps(node, self._last), node)

    def _is_steady(self, node: fx.Node) -> bool:
        """Whether the value is constant and no reader of the node sees it changed in place."""
        if not self.is_constant(node):
            return False
        last_use = max((self._order[user] for user in node.users), default=0)
        written = (self._order[writer] for writer in self._aliases[node].writers)
        return not any(self._order[node] < position < last_use for position in written)

    def _is_sound(self, step: fx.Node) -> bool:
        if step not in self._pure:
            return False
        changing = step.op == "get_attr" and storage_of(self._stored(str(step.target))) in self._changing
        return not changing and not self._aliases[step].is_rewritten

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the shape of the value of a constant, None where it is no tensor, number, or nothing that stays."""
        if node not in self._shapes:
            self._shapes[node] = self._computed_shape(node)
        return self._shapes[node]

    def _computed_shape(self, node: fx.Node) -> tuple[int, ...] | None:
        try:
            stored = node.op == "get_attr"
            value = self._stored(str(node.target)) if stored else self._watched(self._steps(node, node), node)
        except NotReproducible:
            return None
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return () if isinstance(value, int | float) else None

    def _steps(self, node: fx.Node, stop: fx.Node) -> list[fx.Node]:
        """Return all that has to run for the value of ``node`` as it is after ``stop``, in order."""
        end, found, pending = self._order[stop], set[fx.Node](), [node]
        while pending:
            step = pending.pop()
            if step in found:
                continue
            found.add(step)
            pending += step.all_input_nodes
            pending += [writer for writer in self._aliases[step].writers if self._order[writer] <= end]
        return sorted(found, key=self._order.__getitem__)

    def _watched(self, steps: list[fx.Node], node: fx.Node) -> Any:
        """Run the steps on the tensors of the module. Raises NotReproducible where that would not do."""
        leaves = [self._stored(str(step.target)) for step in steps if step.op == "get_attr"]
        with torch.no_grad(), reproducible(leaves):
            return run(steps, self.module, self._stored)[node]

    def _stored(self, name: str) -> Any:
        path, _, leaf = name.rpartition(".")
        return getattr(self.module.get_submodule(path), leaf, None)

    def _grow(self) -> None:
        """Take in the nodes that were appended since."""
        node = self._last.next if self._last is not None else next(iter(self.graph.nodes), None)
        while node is not None and node.op != "root":
            self._order[node] = len(self._order)
            self._add(node)
            self._names.clear()
            self._last, node = node, node.next

    def _add(self, node: fx.Node) -> None:
        part = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        opaque = (str(node.target),) if part is not None and not is_stock(part) else ()
        stored = self._stored(str(node.target)) if node.op == "get_attr" else None
        storage = storage_of(stored) if isinstance(stored, Tensor) else None
        self._aliases.add(node, part, opaque, storage=storage)
        if part is not None and (opaque or part.training):
            self._changing |= {storage_of(tensor) for tensor in part.buffers()}
        if isinstance(stored, Tensor) or (
            node.op.startswith("call_")
            and not is_foreign(node, opaque)
            and called(node) not in _UNSET
            and (part is None or _is_function(part))
            and self._pure.issuperset(node.all_input_nodes)
        ):
            self._pure.add(node)


_UNSET = frozenset(
    {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
)
"""What returns memory as it finds it. Operators do so too, inside, and fill it: these are told by name."""


def widened(tensor: Tensor) -> Tensor:
    """Return the numbers in float64 (complex ones in complex128); integers as they are."""
    numeric = tensor.is_floating_point() or tensor.is_complex()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64)) if numeric else tensor


def _is_function(module: nn.Module) -> bool:
    """Whether the module has nothing of its own that its result could depend on."""
    tensors = (*module.parameters(), *module.buffers())
    return is_stock(module) and not tensors and not module.training and not hooks_of(module)


def lookup(module: nn.Module, constants: Constants) -> Callable[[str], Tensor]:
    """Return the function that gives every constant of a graph of ``module`` by name, computed ones in float64."""
    stored = dict(named_tensors(module, remove_duplicate=False))

    def tensor(name: str) -> Tensor:
        found = stored.get(name)
        return (constants.evaluate(name, stored.__getitem__) if found is None else found).detach()

    return tensor
