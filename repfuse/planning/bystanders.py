"""Nodes that take no part in the arithmetic: what only checks, measures or prepares for others."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from repfuse.ops import Meaning
from repfuse.ops.meaning import Passage
from repfuse.tracing.memory import written_by
from repfuse.tracing.trace import Traced


@dataclass(frozen=True)
class Bystanders:
    """``ghosts`` read no values and change nothing: assertions, dead ends.

    ``sizes`` measure tensors for operations that are known. ``helpers`` are needed by their readers alone and go with
    them: parameters, weights computed from them, sizes, lists of chunks. Helpers that write are in ``written``, with
    the values that lie in the memory that they change: these have readers too.
    """

    ghosts: frozenset[fx.Node]
    sizes: frozenset[fx.Node]
    helpers: frozenset[fx.Node]
    written: Mapping[fx.Node, frozenset[fx.Node]]

    def reads_nothing(self, node: fx.Node) -> bool:
        """Whether ``node`` looks at no values of its inputs, or only for operations that are known."""
        return node in self.ghosts or node in self.sizes


def bystanders(traced: Traced, meanings: Mapping[fx.Node, Meaning | None], ghosts: frozenset[fx.Node]) -> Bystanders:
    """Sort the nodes of a graph whose meanings are known."""
    sizes: set[fx.Node] = set()
    for node in reversed(traced.nodes):
        measures = node.op in ("call_function", "call_method") and node not in traced.shape_of
        known = (user in sizes or user in ghosts or meanings.get(user) is not None for user in node.users)
        if measures and not isinstance(meanings.get(node), Passage) and _measures(node, traced) and all(known):
            sizes.add(node)
    passages = {node for node in traced.nodes if isinstance(meanings.get(node), Passage)}
    constants = {node for node in traced.nodes if traced.constants.is_constant(node)}
    written = {node: traced.constants.memory_of(node) for node in constants if _writes(node, traced)}
    return Bystanders(ghosts, frozenset(sizes), frozenset(sizes | passages | constants), written)


def _writes(node: fx.Node, traced: Traced) -> bool:
    """Whether a node has to stay even where nothing needs its result: the memory that it changes is read elsewhere."""
    part = traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return bool(written_by(node, part, traced.opaque))


_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem, operator.neg})


def _measures(node: fx.Node, traced: Traced) -> bool:
    """Whether a node that is no tensor says what kind of one it is, or is a number computed from sizes."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.target in _ARITHMETIC and not any(x in traced.shape_of for x in node.all_input_nodes)


_ASSERTIONS = (torch._assert, torch.ops.aten._assert_tensor_metadata.default)

_METADATA = frozenset(
    {
        getattr,
        operator.is_,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        operator.getitem,
    }
)


def find_ghosts(traced: Traced) -> frozenset[fx.Node]:
    """Return the nodes that only check metadata: assertions, what nothing else needs, parameters read in vain.

    They read no values, and what they assert of a tensor's rank holds for the fused one too. What a trace has taken for
    fixed stays asserted: with another value the graph is not the module.
    """
    ghosts: set[fx.Node] = set()
    for node in reversed(traced.nodes):
        if node.target in _ASSERTIONS and not _fixes_an_argument(node, traced):
            ghosts.add(node)
        elif not ghosts.issuperset(node.users):
            continue
        elif node.op == "get_attr" or (traced.constants.name_of(node) is not None and not _writes(node, traced)):
            ghosts.add(node)
        elif node in traced.shape_of:
            continue
        elif node.target in _METADATA or (node.op == "call_method" and node.target in ("size", "dim")):
            ghosts.add(node)
    return frozenset(ghosts)


def _fixes_an_argument(assertion: fx.Node, traced: Traced) -> bool:
    """Whether it asserts that an argument which is no tensor has the value that it was traced with."""
    asked = (value for condition in assertion.all_input_nodes for value in condition.all_input_nodes)
    return any(value.op == "placeholder" and value not in traced.shape_of for value in asked)
