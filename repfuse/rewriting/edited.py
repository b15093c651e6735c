"""What a rewrite takes from the module that is given: the edits, and tensors for the copy."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from repfuse.algebra.expression import tensor_names
from repfuse.networks import named_tensors
from repfuse.planning.replaying import Replayed
from repfuse.recording.constants import lookup
from repfuse.recording.copies import like


class Edits:
    """The edits of a network, and the tensors that they take."""

    def __init__(self, replayed: Replayed) -> None:
        self.layout = replayed.layout
        self.constants = replayed.planner.recording.constants
        same = replayed.module is self.constants.module
        self.tensors = self.constants.tensors if same else dict(named_tensors(replayed.module, remove_duplicate=False))
        self.tensor = lookup(replayed.module, self.constants)

    def replaced(self) -> Iterator[Tensor]:
        """Yield the tensors that go into fused weights."""
        named = (name for fused in self.layout.fused for name in tensor_names(fused.expression))
        names = {leaf for name in named for leaf in self.constants.leaves(name)}
        return (self.tensors[name] for name in names)


def stand_in(tensor: Tensor) -> Tensor:
    """Return a tensor without data for one that is to be replaced, so that it is never copied."""
    return like(tensor, tensor.to("meta"))


def clone(tensor: Tensor) -> Tensor:
    """Return a copy without a history."""
    return like(tensor, tensor.detach().clone())
