"""Real inputs in batches that are made when they are asked for: a folder of 50,000 images never lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from repfuse.errors import RepfuseError

CHUNK = 64  # samples per call, at most
PER_CALL = 1 << 21  # input elements per call, so that activations stay small: 13 images of 3x224x224
Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Samples:
    """``count`` samples of ``numbers`` elements each, for the network's first input.

    ``make`` returns the samples ``[k, ...]`` at ``k`` positions in a row. ``notes`` say how they were made. ``at_once``
    is the most that a network takes in one call.
    """

    count: int
    numbers: int
    make: Callable[[range], torch.Tensor]
    notes: tuple[str, ...] = ()
    at_once: int = CHUNK

    def __iter__(self) -> Iterator[torch.Tensor]:
        step = min(self.at_once, per_call(self.numbers))
        for start in range(0, self.count, step):
            yield self.make(range(start, min(start + step, self.count)))


Data = torch.Tensor | Samples | Iterable[torch.Tensor | Inputs]
"""One batch, or several that can be walked more than once; a tuple each where the network takes several inputs."""


def per_call(numbers: int) -> int:
    """Return how many samples of so many elements go into one call: one at least."""
    return min(CHUNK, max(1, PER_CALL // max(1, numbers)))


def chunks(data: Data) -> Iterator[Inputs]:
    """Yield ``data`` in pieces that fit one call each. Raises RepfuseError where it holds no samples."""
    if isinstance(data, Iterator):
        what = f"The data is a {type(data).__name__}, which can be walked only once."
        raise RepfuseError(what, "It is walked several times.", "Give a tensor, a list of batches, or the like.")
    found = False
    for batch in [data] if isinstance(data, torch.Tensor) else data:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        step = per_call(inputs[0][:1].numel())
        for start in range(0, len(inputs[0]), step):
            found = True
            yield tuple(x[start : start + step] for x in inputs)
    if not found:
        raise RepfuseError("The data holds no samples.", "", "Give at least one input of the network's shape.")


def total(data: Data) -> int | None:
    """Return the number of samples where it is known without making them."""
    if isinstance(data, Samples):
        return data.count
    batches = [data] if isinstance(data, torch.Tensor) else data
    if not isinstance(batches, Sequence):
        return None
    return sum(len(batch[0] if isinstance(batch, tuple) else batch) for batch in batches)
