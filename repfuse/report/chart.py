"""Charts on a logarithmic axis: a row for each measurement, and for each kernel. The template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from repfuse.benching.results import Measurement
from repfuse.quantization import SiteKernels
from repfuse.report.bench_view import gain, speed, where
from repfuse.report.tables import duration, interval, percent


@dataclass(frozen=True)
class Speed:
    """A row of the chart: how many times as fast as the original, with a 95 % interval."""

    entry: Measurement

    @property
    def label(self) -> str:
        """The setting."""
        return where(self.entry)

    @property
    def times(self) -> tuple[str, str]:
        """The time of a call of both."""
        return duration(self.entry.original.median), duration(self.entry.fused.median)

    @property
    def over_eager(self) -> float | None:
        """The ratio to the original in PyTorch's eager mode, where this is another runtime."""
        return self.entry.over_eager.value if self.entry.over_eager else None

    @property
    def limit(self) -> float | None:
        """The ratio that a network has which is as fast as this machine gets: as a plain matrix product."""
        floor = self.entry.fused.floor
        return self.entry.speedup * self.entry.fused.median / floor if floor else None

    @property
    def gain(self) -> str:
        """The ratio, where the interval does not hold 1."""
        return gain(self.entry)

    @property
    def interval(self) -> str:
        """The interval in words."""
        return interval(self.entry.low, self.entry.high)

    @property
    def share(self) -> str:
        """The share that the fused network reaches of this machine's speed."""
        return "" if self.entry.fused.of_machine is None else percent(self.entry.fused.of_machine)

    @property
    def sentence(self) -> str:
        """How much faster or slower it is."""
        return speed(self.entry)


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis between its ``ends``: twice as much is as far from 1 as half as much."""

    ends: tuple[float, float]

    @property
    def ticks(self) -> list[float]:
        """Round numbers, as many as have room."""
        span = self.ends[1] / self.ends[0]
        steps = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if span < 3 else (1, 2, 5) if span < 300 else (1,)
        candidates = (step * 10**power for power in range(-9, 10) for step in steps)
        return [each for each in candidates if self.ends[0] < each < self.ends[1]]

    def at(self, number: float) -> str:
        """Return where a number stands on the axis, in percent of its width; at its beginning, what is less."""
        least, greatest = map(log, self.ends)
        return f"{100 * (log(max(number, self.ends[0])) - least) / (greatest - least):.2f}%"

    def holds(self, number: float | None) -> bool:
        """Whether the axis reaches so far."""
        return number is not None and self.ends[0] < number < self.ends[1]


def speed_axis(rows: Sequence[Speed]) -> Axis:
    """Return an axis that holds 1 and all ratios; a limit far beyond all ratios is not drawn."""
    over = [row.over_eager for row in rows if row.over_eager]
    least = min(1.0, *over, *(row.entry.low for row in rows))
    greatest = max(1.0, *over, *(row.entry.high for row in rows))
    limits = [row.limit for row in rows if row.limit and row.limit < 4 * greatest]
    return Axis((least / 1.12, max(greatest, *limits, 1.0) * 1.12))


RANGES_SHOWN = 1e5
"""A channel whose range is so many times smaller than the largest is drawn at the beginning of the axis."""


def range_axis(sites: Sequence[SiteKernels]) -> Axis:
    """Return an axis that holds the ranges of the channels of all kernels."""
    found = [size for site in sites for size in (*site.before.ranges, *site.after.ranges) if size > 0]
    greatest = max(found, default=1.0)
    return Axis((max(min(found, default=1.0), greatest / RANGES_SHOWN) / 1.12, greatest * 1.12))
