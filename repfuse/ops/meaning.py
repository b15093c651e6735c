"""What a graph node can mean to the planner: the few kinds that the tables of this package translate nodes into.

It is an operation of the algebra on nodes, or one of the kinds below. ``axis`` is where the channels are: 1 for
convolutions, the last for linear layers; None where one number serves all channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through, operands
from repfuse.algebra.geometry import Ints
from repfuse.algebra.layers import Convolution, Factor


@dataclass(frozen=True)
class Same:
    """The node returns ``input`` itself, or a value equal to it."""

    input: fx.Node


@dataclass(frozen=True)
class Rearranged:
    """The node holds the values of ``input`` elsewhere, or means of them, alike for every channel (``ops.channels``).

    ``moves`` are pairs of an axis that may hold the channels, and where they then are in the node. Where pixels of
    several channels become those of one, ``channels`` says for each which one that is; if the node does that for any
    number of channels, ``phases`` says which of the pixels, as a number. A ``view`` has the numbers in the same order.
    """

    input: fx.Node
    moves: tuple[tuple[int, int], ...]
    view: bool = field(default=False, kw_only=True)
    channels: Ints = ()
    phases: Ints = ()


@dataclass(frozen=True)
class Passage:
    """The node only hands its inputs on to a reader that names them itself: the list that ``chunk`` returns, the stack
    before its sum, the views of a channel shuffle. By itself it is nothing to merge.
    """


@dataclass(frozen=True)
class Unfusible:
    """The node looks like one of the above and is not: a refusal, if something could have been merged with it."""

    code: str
    reason: str


Combination = Sum[fx.Node | Scaled[fx.Node]]
"""A sum of nodes and of multiples of nodes: by a number, or by one per channel."""

Meaning = (
    Through[fx.Node]
    | Scaled[fx.Node]
    | Selected[fx.Node]
    | Joined[fx.Node]
    | Combination
    | Same
    | Rearranged
    | Passage
    | Unfusible
)


def combination(*terms: tuple[fx.Node, float]) -> Combination:
    """Return the sum of nodes, each times a number."""
    return Sum(tuple(node if factor == 1 else Scaled(node, Factor(factor)) for node, factor in terms))


def terms_of(combined: Combination) -> Iterator[Scaled[fx.Node]]:
    """Yield the nodes of a combination, each with its factor."""
    for term in combined.inputs:
        yield term if isinstance(term, Scaled) else Scaled(term, Factor(1.0))


def convolves(meaning: Meaning | None) -> bool:
    """Whether a meaning is a convolution or a linear layer."""
    return isinstance(meaning, Through) and isinstance(meaning.layer, Convolution)


def inputs_of(meaning: Meaning | None) -> tuple[fx.Node, ...]:
    """Return the nodes that a meaning reads as data; a passage hands on, and reads nothing itself."""
    match meaning:
        case Same(node) | Rearranged(node):
            return (node,)
        case Sum():
            return tuple(term.input if isinstance(term, Scaled) else term for term in meaning.inputs)
        case _:
            return operands(meaning)
