"""Nodes that take no part in the arithmetic: what only measures, or prepares for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from repfuse.ops.meaning import Meaning, Passage
from repfuse.ops.spelling import makes_zeros
from repfuse.recording.recording import Recording


@dataclass(frozen=True)
class Bystanders:
    """``dead`` is code that reads no values and changes nothing.

    ``sizes`` measure tensors for operations that are known. ``helpers`` are needed by their readers alone and go with
    them: parameters, weights computed from them, sizes, lists of chunks. Helpers that write are in ``written``, with
    the values that lie in the memory that they change: these have readers too.
    """

    dead: frozenset[fx.Node]
    sizes: frozenset[fx.Node]
    helpers: frozenset[fx.Node]
    written: Mapping[fx.Node, frozenset[fx.Node]]

    def reads_nothing(self, node: fx.Node) -> bool:
        """Whether ``node`` looks at no values of its inputs, or only for operations that are known."""
        return node in self.dead or node in self.sizes


def bystanders(
    recording: Recording, meanings: Mapping[fx.Node, Meaning | None], dead: frozenset[fx.Node]
) -> Bystanders:
    """Sort the nodes of a graph whose meanings are known."""
    sizes: set[fx.Node] = set()
    for node in reversed(recording.nodes):
        known = (user in sizes or user in dead or meanings.get(user) is not None for user in node.users)
        if _measures(node, recording) and all(known):
            sizes.add(node)
    passages = {node for node in recording.nodes if isinstance(meanings.get(node), Passage)}
    plain = {node for node in recording.nodes if node.op == "get_attr" or node.target is getattr or makes_zeros(node)}
    constants = plain.union(filter(recording.constants.is_constant, recording.nodes))
    memory = recording.memory
    written = {node: frozenset(memory.members(node)) for node in constants if memory.writes(node)}
    measures = {node for node in recording.nodes if _measures(node, recording)}
    return Bystanders(dead, frozenset(sizes), frozenset(measures | passages | constants), written)


def find_dead(recording: Recording) -> frozenset[fx.Node]:
    """Return what nothing needs: sizes and dtypes, parts of lists, parameters that were read in vain."""
    dead: set[fx.Node] = set()
    memory = recording.memory
    for node in reversed(recording.nodes):
        if not dead.issuperset(node.users) or memory.writes(node) or node in recording.escaping:
            continue
        part = getattr(node.target, "__name__", "") == "getitem" and node.all_input_nodes[0] not in recording.shape_of
        useless = part or _measures(node, recording) or recording.constants.is_constant(node)
        if useless and node.op != "placeholder":
            dead.add(node)
    return frozenset(dead)


def _measures(node: fx.Node, recording: Recording) -> bool:
    """Whether a node is a size of a tensor, a number computed from sizes, or the dtype or device of a tensor."""
    return node in recording.run.size_of or (node.target is getattr and node not in recording.shape_of)
