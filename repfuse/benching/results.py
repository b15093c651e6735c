"""What a benchmark found, as plain data. No torch here. Times are seconds per call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from repfuse.jsonready import Result

SpeedVerdict = Literal["faster", "slower", "no difference"]
COLD_NOTE = (
    "One cold call each, original first: the first caller pays for allocation and for choosing kernels, so "
    "this order alone makes the second network look faster. It is no measurement of speed."
)


@dataclass(frozen=True)
class NetworkCost:
    """What one network stores and computes at the shapes in ``Benchmark.shapes``.

    ``parameters`` numbers, buffers not counted; ``weight_bytes`` of parameters and buffers; ``macs``
    multiply-accumulates of convolutions and matrix products (half of what torch's FLOP counter gives; sums,
    normalisations and activations are not counted), None where the counter cannot run; ``peak_bytes`` the
    weights and what a call allocates on the device at its peak, on CUDA only.
    """

    parameters: int
    weight_bytes: int
    macs: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Timing:
    """The timings of one network: ``times`` one per round, each the mean of ``calls`` calls in a row."""

    median: float
    fastest: float
    slowest: float
    calls: int
    times: tuple[float, ...]


@dataclass(frozen=True)
class Measurement(Result):
    """Both networks at one batch size and thread count.

    ``speedup`` is the original's median time over the fused network's, more than 1 where the fused one is
    faster; ``low`` and ``high`` bound its 95 % bootstrap interval.
    """

    ALSO: ClassVar[tuple[str, ...]] = ("verdict",)
    batch_size: int
    threads: int
    original: Timing
    fused: Timing
    speedup: float
    low: float
    high: float
    warnings: tuple[str, ...]

    @property
    def steady(self) -> bool:
        """Whether the interval is narrow enough for one number to stand for it: within a factor of two."""
        return self.high <= 2 * self.low

    @property
    def says_nothing(self) -> bool:
        """Whether it is too noisy to tell either network from the other, or to say that they are alike."""
        return self.verdict == "no difference" and not self.steady

    @property
    def verdict(self) -> SpeedVerdict:
        """``no difference`` where the interval holds 1."""
        if self.low <= 1 <= self.high:
            return "no difference"
        return "faster" if self.low > 1 else "slower"


@dataclass(frozen=True)
class ColdCalls:
    """The notebook's method: one call of each network, unwarmed, the original first. See ``note``."""

    original: float
    fused: float
    note: str = COLD_NOTE


@dataclass(frozen=True)
class Benchmark(Result):
    """Costs before and after, and a measurement per batch size and thread count.

    ``shapes`` are those of the example inputs, to which ``before`` and ``after`` refer.
    """

    device: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    before: NetworkCost
    after: NetworkCost
    measurements: tuple[Measurement, ...]
    cold: ColdCalls | None = None
