"""What a graph node can mean to the planner: the few kinds that the tables of this package translate nodes into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from repfuse.algebra.expression import Convolution, Normalisation


@dataclass(frozen=True)
class Convolved:
    """The node is a convolution of ``input``."""

    input: fx.Node
    convolution: Convolution


@dataclass(frozen=True)
class Normed:
    """The node is a normalisation of ``input`` with frozen statistics."""

    input: fx.Node
    normalisation: Normalisation


@dataclass(frozen=True)
class Combined:
    """The node is a sum of its inputs, each times a number."""

    terms: tuple[tuple[fx.Node, float], ...]
    in_place: bool = False


@dataclass(frozen=True)
class Same:
    """The node returns ``input`` itself, or a value equal to it."""

    input: fx.Node


@dataclass(frozen=True)
class Unfusible:
    """The node looks like one of the above and is not: a refusal, if something could have been merged with it."""

    code: str
    reason: str


Meaning = Convolved | Normed | Combined | Same | Unfusible


def inputs_of(meaning: Meaning | None) -> tuple[fx.Node, ...]:
    """Return the nodes that a meaning reads as data."""
    match meaning:
        case Convolved(node) | Normed(node) | Same(node):
            return (node,)
        case Combined(terms):
            return tuple(node for node, _ in terms)
        case _:
            return ()


def origin(node: fx.Node, meanings: Mapping[fx.Node, Meaning | None]) -> fx.Node:
    """Return the node whose value ``node`` passes on unchanged."""
    while isinstance(meaning := meanings.get(node), Same):
        node = meaning.input
    return node
