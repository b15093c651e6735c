"""What a graph node can mean to the planner: the few kinds that the tables of this package translate nodes into.

Every kind is an affine map of its inputs, axis by axis of the tensors in the graph. ``axis`` is where the channels
are: 1 for convolutions, the last for linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from repfuse.algebra.layers import Channelwise, Convolution, Layer


@dataclass(frozen=True)
class Applied:
    """The node is a convolution, a linear layer, or another filter of ``input``: a pool, a pad, a crop."""

    input: fx.Node
    layer: Layer


@dataclass(frozen=True)
class Rescaled:
    """The node is ``input``, each channel times a number, plus a number: a normalisation, a layer scale.

    ``axis`` is None where one number serves all channels.
    """

    input: fx.Node
    by: Channelwise
    axis: int | None
    in_place: bool = False


@dataclass(frozen=True)
class Combined:
    """The node is a sum of its inputs, each times a number."""

    terms: tuple[tuple[fx.Node, float], ...]
    in_place: bool = False


@dataclass(frozen=True)
class Selected:
    """The node holds the channels ``indices`` of ``input``, in this order."""

    input: fx.Node
    indices: tuple[int, ...]
    axis: int


@dataclass(frozen=True)
class Stacked:
    """The node holds the channels of its inputs one after the other."""

    inputs: tuple[fx.Node, ...]
    axis: int


@dataclass(frozen=True)
class Same:
    """The node returns ``input`` itself, or a value equal to it."""

    input: fx.Node


@dataclass(frozen=True)
class Passage:
    """The node only hands its inputs on to a reader that names them itself: the list that ``chunk`` returns, the stack
    before its sum, the views of a channel shuffle. By itself it is nothing to merge.
    """

    inputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Unfusible:
    """The node looks like one of the above and is not: a refusal, if something could have been merged with it."""

    code: str
    reason: str


Meaning = Applied | Rescaled | Combined | Selected | Stacked | Same | Passage | Unfusible


def convolves(meaning: Meaning | None) -> bool:
    """Whether a meaning is a convolution or a linear layer."""
    return isinstance(meaning, Applied) and isinstance(meaning.layer, Convolution)


def inputs_of(meaning: Meaning | None) -> tuple[fx.Node, ...]:
    """Return the nodes that a meaning reads as data; a passage hands on, and reads nothing itself."""
    match meaning:
        case Applied(node) | Rescaled(node) | Selected(node) | Same(node):
            return (node,)
        case Combined(terms):
            return tuple(node for node, _ in terms)
        case Stacked(inputs):
            return inputs
        case _:
            return ()


def origin(node: fx.Node, meanings: Mapping[fx.Node, Meaning | None]) -> fx.Node:
    """Return the node whose value ``node`` passes on unchanged."""
    while isinstance(meaning := meanings.get(node), Same):
        node = meaning.input
    return node
