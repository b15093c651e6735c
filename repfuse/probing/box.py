"""The block under test: a function of one tensor, and nothing else is known of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repfuse.wording import described

LARGEST = 2**22
"""Numbers that one call is given."""


class Refused(Exception):
    """The block is no affine, shift-equivariant map, or does not show that it is one; the text says why."""


class DoesNotRun(Refused):
    """The block does not take an input of this size."""


class Box:
    """Answers of ``run``, which takes ``[N, channels, *size]`` in float64 and returns ``[N, out, *size']``.

    Where ``run`` takes batches of one size only, ``batch`` is that size.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], channels: int, ndim: int, batch: int | None = None) -> None:
        self.run = run
        self.channels = channels
        self.ndim = ndim
        self.batch = batch
        self.calls = 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the answers to ``x``. Raises DoesNotRun where it fails, Refused where it returns something else."""
        step = self.batch or max(1, LARGEST // max(1, x[0].numel()))
        return torch.cat([self._answer(part) for part in torch.split(x, step)])

    def _answer(self, x: Tensor) -> Tensor:
        missing = (self.batch or len(x)) - len(x)
        given = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x.clone()
        before = given.clone()
        self.calls += 1
        try:
            y = self.run(given)
        except Exception as error:  # whatever a forward may raise
            raise DoesNotRun(described(error)) from error
        if not torch.equal(given, before):
            raise Refused("it writes into its input")
        if not isinstance(y, Tensor) or y.dtype != torch.float64 or y.layout != torch.strided:
            raise Refused("it does not return one tensor in float64")
        if y.dim() != 2 + self.ndim or len(y) != len(given):
            raise Refused(f"of an input {_shape(x)} it makes {_shape(y)}")
        return y[: len(x)].to("cpu", copy=True)

    def zeros(self, size: tuple[int, ...], batch: int = 1) -> Tensor:
        """Return an input of zeros."""
        return torch.zeros((batch, self.channels, *size), dtype=torch.float64)

    def runs(self, size: tuple[int, ...]) -> bool:
        """Whether it takes this size, and gives something that is not empty."""
        try:
            return self(self.zeros(size)).numel() > 0
        except DoesNotRun:
            return False


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
