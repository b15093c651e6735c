"""Whether a layer pads with the very numbers that lie beyond the border: the one question that takes the weights."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from repfuse.algebra.evaluation import border_takes_weights, check_borders
from repfuse.algebra.expression import Expression
from repfuse.algebra.geometry import NotAffine
from repfuse.algebra.layers import Layer
from repfuse.networks import device_of
from repfuse.recording.constants import lookup
from repfuse.recording.recording import Recording


class Borders:
    """Answers from the weights of the model, or from the answers of an earlier plan, ``known``, by name of the layer.

    ``matching`` collects the layers for which it depends on the weights, and holds.
    """

    def __init__(self, recording: Recording, known: Collection[str] | None = None) -> None:
        self.names = recording.names
        self.tensors = lookup(recording.module, recording.constants)
        self.device = device_of(recording.module)
        self.known = known
        self.matching: set[str] = set()

    def check(self, inner: Expression, layer: Layer, node: fx.Node) -> None:
        """Raise NotAffine where ``layer``, at ``node``, pads ``inner`` with something else than what it is there."""
        if not border_takes_weights(inner, layer):
            return
        if self.known is None:
            check_borders(inner, layer, self.tensors, self.device)
        elif self.names[node] not in self.known:
            raise NotAffine("shift-before-padding", "a layer that adds a constant, before one that pads with another")
        self.matching.add(self.names[node])
