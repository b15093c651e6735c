"""What a node computes, as a sum of terms: each one branch, an affine map of one source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from torch import fx

from repfuse.algebra.expression import (
    Expression,
    convolutions,
    multiple_of_source,
    sum_of,
)
from repfuse.algebra.geometry import Ints

Nodes = frozenset[fx.Node]


@dataclass(frozen=True)
class Term:
    """One branch: ``expression`` of ``source``, made by ``nodes``; ``top`` is the last node that holds it alone.

    Where it was rearranged on the way (``ops.rows``), ``axis`` is where its channels are now: it is a map of channels
    alone, and of rows that are others than those of its source. Where several channels became one, ``picks`` says which
    one each of them is in, and ``phases`` which of its pixels it is, if it can be another number of channels.
    """

    source: fx.Node
    expression: Expression
    nodes: Nodes
    top: fx.Node
    axis: int | None = None
    picks: Ints = ()
    phases: Ints = ()

    @cached_property
    def of_source(self) -> float | None:
        """The number that the branch multiplies its source by, if it does nothing else."""
        return multiple_of_source(self.expression)

    @cached_property
    def convolves(self) -> bool:
        """Whether there is a convolution in the branch."""
        return next(convolutions(self.expression), None) is not None


@dataclass(frozen=True, eq=False)
class Group:
    """Branches of one source that are together one map. Raises NotAffine where they are not."""

    terms: tuple[Term, ...]

    @property
    def source(self) -> fx.Node:
        """The tensor that the branches read."""
        return self.terms[0].source

    @cached_property
    def expression(self) -> Expression:
        """The map."""
        return sum_of(tuple(term.expression for term in self.terms))

    @cached_property
    def nodes(self) -> Nodes:
        """The nodes that the map replaces."""
        return frozenset(chain.from_iterable(term.nodes for term in self.terms))

    @property
    def of_source(self) -> float | None:
        """The number that the group multiplies its source by, if it does nothing else."""
        return self.terms[0].of_source if len(self.terms) == 1 else None

    @property
    def convolves(self) -> bool:
        """Whether there is a convolution to merge the rest into."""
        return any(term.convolves for term in self.terms)
