"""A kernel as plain numbers, and what it answers to probes: index arithmetic and sums, no operator that convolves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repfuse.probing.axes import Axis
from repfuse.probing.box import Refused
from repfuse.probing.probes import Probes


@dataclass(frozen=True)
class Kernel:
    """``weight`` is ``[out, in / groups, *taps]``, ``bias`` ``[out]``, in float64; ``axes`` say where the taps lie."""

    weight: Tensor
    bias: Tensor
    axes: tuple[Axis, ...]
    groups: int = 1

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] * self.groups

    @property
    def terms(self) -> int:
        """How many products make one output."""
        return self.weight[0].numel()

    def output_size(self, size: Sequence[int]) -> tuple[int, ...] | None:
        """Return the spatial size of the output; None where there is none."""
        tables = [axis.reads(n) for axis, n in zip(self.axes, size, strict=True)]
        return None if any(table is None for table in tables) else tuple(len(t) for t in tables if t is not None)

    def answer(self, probes: Probes) -> Tensor:
        """Return ``[P, out, *outputs]``, without the bias: contracted channel by channel, then axis by axis.

        Raises Refused where it has no output at this size.
        """
        taps = self._seen_by(probes.channels)
        for number, (axis, places) in enumerate(zip(self.axes, probes.places, strict=True)):
            table = axis.reads(places.shape[1])
            if table is None:
                raise Refused(f"it gives something for {places.shape[1]} places, of which the kernel makes nothing")
            with_zero = torch.cat([places, places.new_zeros(len(places), 1)], 1)
            taps = torch.einsum("p...k,pmk->p...m", taps.movedim(2 + number, -1), with_zero[:, table])
            taps = taps.movedim(-1, 2 + number)
        return taps

    def _seen_by(self, channels: Tensor) -> Tensor:
        """Return ``[P, out, *taps]``: the sum of the input channels, each times its number."""
        blocks = self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        given = channels.reshape(len(channels), self.groups, -1)
        return torch.einsum("goi...,pgi->pgo...", blocks, given).flatten(1, 2)

    def absolute(self) -> Kernel:
        """Return the kernel of the magnitudes: its answer bounds what rounding is relative to."""
        return replace(self, weight=self.weight.abs(), bias=self.bias.abs())
