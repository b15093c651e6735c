"""Charts on a logarithmic axis: a row for each measurement, and for each kernel. The template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from repfuse.quantization import SiteKernels
from repfuse.report.reading import Measurement
from repfuse.report.tables import duration, percent, plural


@dataclass(frozen=True)
class Speed:
    """A row of the chart: how many times as fast as the original, with a 95 % interval.

    ``over_eager`` is the ratio to the original in PyTorch's eager mode, where this is another runtime. ``floor`` is the
    share that the fused network reaches of this machine's speed, that of a plain matrix product.
    """

    label: str
    times: tuple[str, str]
    ratio: float
    low: float
    high: float
    over_eager: float | None = None
    floor: float | None = None

    @property
    def limit(self) -> float | None:
        """The ratio that a network has which is as fast as this machine gets."""
        return self.ratio / self.floor if self.floor else None

    @property
    def says_nothing(self) -> bool:
        """Whether it is too noisy, as ``benching.results.Measurement`` says it."""
        return self.low <= 1 <= self.high and self.high > 2 * self.low

    @property
    def gain(self) -> str:
        """The ratio, where the interval does not hold 1."""
        if self.says_nothing:
            return "too noisy"
        return "no difference" if self.low <= 1 <= self.high else times(self.ratio)

    @property
    def interval(self) -> str:
        """The interval in words."""
        return f"{_digits(self.low)} to {_digits(self.high)}"

    @property
    def share(self) -> str:
        """The share of this machine's speed."""
        return "" if self.floor is None else percent(self.floor)

    @property
    def sentence(self) -> str:
        """How much faster or slower it is."""
        if self.says_nothing:
            return "timing too noisy to say anything"
        if self.low <= 1 <= self.high:
            return f"no difference in speed ({self.interval})"
        interval = self.interval if self.low > 1 else f"{_digits(1 / self.high)} to {_digits(1 / self.low)}"
        return f"{compared(self.ratio)} ({interval})"


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
    least = min(1.0, *over, *(row.low for row in rows))
    greatest = max(1.0, *over, *(row.high for row in rows))
    limits = [row.limit for row in rows if row.limit and row.limit < 4 * greatest]
    return Axis((least / 1.12, max(greatest, *limits, 1.0) * 1.12))


RANGES_SHOWN = 1e5
"""A channel whose range is so many times smaller than the largest is drawn at the beginning of the axis."""


def range_axis(sites: Sequence[SiteKernels]) -> Axis:
    """Return an axis that holds the ranges of the channels of all kernels."""
    found = [size for site in sites for size in (*site.before.ranges, *site.after.ranges) if size > 0]
    greatest = max(found, default=1.0)
    return Axis((max(min(found, default=1.0), greatest / RANGES_SHOWN) / 1.12, greatest * 1.12))


def speed_of(entry: Measurement) -> Speed:
    """Return the row of a measurement."""
    within = "" if entry.runtime == "eager" else f"{entry.runtime}, "
    label = f"{within}batch {entry.batch_size}, {plural(entry.threads, 'thread')}"
    both = duration(entry.original.median), duration(entry.fused.median)
    over_eager = entry.over_eager.value if entry.over_eager and within else None
    floor = entry.fused.floor / entry.fused.median if entry.fused.floor else None
    return Speed(label, both, entry.speedup, entry.low, entry.high, over_eager, floor)


def times(ratio: float) -> str:
    """Return a ratio: 1.43x, 12.1x."""
    return f"{_digits(ratio)}x"


def compared(ratio: float) -> str:
    """Return a ratio in words: 1.43x faster, 2.00x slower."""
    return f"{times(ratio)} faster" if ratio >= 1 else f"{times(1 / ratio)} slower"


def _digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}"
