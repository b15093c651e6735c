"""What a benchmark found, as plain data. No torch here. Times are seconds per call.

Anybody may have written the file that it is read from: the types of the fields say what may stand there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, MinLen

from repfuse.plans import Count
from repfuse.wording import Result

COLD_NOTE = (
    "One cold call each, original first: the first caller pays for allocation and for choosing kernels, so "
    "this order alone makes the second network look faster. It is no measurement of speed."
)


class Runtime(StrEnum):
    """Where networks are timed; see ``benching.benchmark.RUNTIMES``."""

    EAGER = "eager"
    COMPILE = "compile"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


Positive = Annotated[float, Ge(1e-12), Le(1e12)]
"""A time in seconds, or a ratio of two: it has a place in a chart."""


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians and its bootstrap interval."""

    value: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True)
class Gain:
    """The difference of two medians, in seconds a call, and its bootstrap interval; below 0 where time is lost."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class NetworkCost:
    """What one network stores and computes at the shapes in ``Benchmark.shapes``.

    ``parameters`` numbers, buffers not counted; ``weight_bytes`` of parameters and buffers; ``macs``
    multiply-accumulates of convolutions and matrix products (half of what torch's FLOP counter gives; sums,
    normalisations and activations are not counted), None where the counter cannot run; ``peak_bytes`` the
    weights and what a call allocates on the device at its peak, on CUDA only.
    """

    parameters: Count
    weight_bytes: Count
    macs: Count | None
    peak_bytes: Count | None


@dataclass(frozen=True)
class Timing:
    """The timings of one network: ``times`` one per round, each the mean of ``calls`` calls in a row.

    ``floor`` is what a plain matrix product of as many multiply-accumulates took in the same rounds, in the same dtype
    and with as many threads; None where these cannot be counted.
    """

    median: Positive
    fastest: Positive
    slowest: Positive
    calls: Count
    times: Annotated[tuple[Positive, ...], MinLen(2)]
    floor: Positive | None = None

    @classmethod
    def of(cls, times: tuple[float, ...], calls: int, floor: float | None = None) -> Timing:
        """Return what is said of these times."""
        return cls(median(times), min(times), max(times), calls, times, floor)

    @property
    def of_machine(self) -> float | None:
        """Which share of the speed of a plain matrix product the network reaches."""
        return None if self.floor is None else self.floor / self.median


@dataclass(frozen=True)
class Measurement(Result):
    """Both networks in one runtime, at one batch size and thread count; ``shapes`` are the inputs', where the benchmark
    is of several.

    ``speedup`` is the original's median time over the fused network's, more than 1 where the fused one is
    faster; ``low`` and ``high`` bound its 95 % bootstrap interval. ``over_eager`` is the same with the original in
    PyTorch's eager mode, in the same rounds, None where that was not timed.
    """

    ALSO: ClassVar[tuple[str, ...]] = ("verdict",)
    batch_size: Count
    threads: Count
    original: Timing
    fused: Timing
    speedup: Positive
    low: Positive
    high: Positive
    warnings: tuple[str, ...]
    runtime: str = Runtime.EAGER
    over_eager: Ratio | None = None
    shapes: tuple[tuple[Count, ...], ...] = ()

    @property
    def steady(self) -> bool:
        """Whether the interval is narrow enough for one number to stand for it: within a factor of two."""
        return self.high <= 2 * self.low

    @property
    def says_nothing(self) -> bool:
        """Whether it is too noisy to tell either network from the other, or to say that they are alike."""
        return self.verdict == "no difference" and not self.steady

    @property
    def verdict(self) -> Literal["faster", "slower", "no difference"]:
        """``no difference`` where the interval holds 1."""
        if self.low <= 1 <= self.high:
            return "no difference"
        return "faster" if self.low > 1 else "slower"


@dataclass(frozen=True)
class SiteTiming:
    """One place of the plan by itself: the original's operations there, and the convolutions that they became.

    ``output`` is what sites of a plan call it, ``predicted`` is how many times as fast the law of cost expects it to
    be, ``before`` and ``after`` are medians. ``gain`` is what the network gains by it: of all places it adds up to what
    the network gains by all.
    """

    path: str
    output: str
    kernel: str
    predicted: Positive | None
    before: Positive
    after: Positive
    speedup: Ratio
    gain: Gain | None = None


@dataclass(frozen=True)
class ColdCalls:
    """The notebook's method: one call of each network, unwarmed, the original first. See ``note``."""

    original: float
    fused: float
    note: str = COLD_NOTE


@dataclass(frozen=True)
class Experiment:
    """The notebook's block of one shape: how many times as fast one convolution is, by one cold call each, warm, and
    warm against the same block with its padding in integers.
    """

    shape: tuple[int, ...]
    cold: float
    warm: Ratio
    integers: Ratio


@dataclass(frozen=True)
class Benchmark(Result):
    """Costs before and after, and a measurement per input, batch size, thread count and runtime.

    ``shapes`` are those of the first example, to which ``before`` and ``after`` refer. ``left_out`` says of runtimes
    that were not timed why. ``sites`` are places of the plan, where they were asked for.
    """

    device: str
    dtype: str
    shapes: tuple[tuple[Count, ...], ...]
    before: NetworkCost
    after: NetworkCost
    measurements: tuple[Measurement, ...]
    cold: ColdCalls | None = None
    left_out: tuple[str, ...] = ()
    sites: tuple[SiteTiming, ...] = ()


@dataclass(frozen=True)
class Change:
    """The fused network at one setting, now and then: how many times as long a call takes, above 1 where it is slower.

    ``beside_original`` is the same in the time of the original of each run, which tells a slower network from a slower
    machine.
    """

    now: Measurement
    ratio: Ratio
    beside_original: Ratio

    @property
    def slower(self) -> bool:
        """Whether it got slower, and the original not as much: beyond both intervals."""
        return self.ratio.low > 1 and self.beside_original.low > 1
