"""What the times of a measurement say, and what to be wary of."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from repfuse.benching.clock import FEWEST_ROUNDS, SHORTEST, Rounds
from repfuse.benching.results import Measurement, Timing
from repfuse.benching.statistics import outliers, ratio_of_medians

OVERHEAD = 50e-6  # seconds: a call this short is mostly Python's and torch's own bookkeeping


def judge(times: Rounds, *, batch_size: int, threads: int, rounds: int) -> Measurement:
    """Return medians, the speed-up with its interval, and warnings; ``rounds`` is the number asked for."""
    ratio = ratio_of_medians(times.first, times.second)
    original, fused = _timing(times.first, times.calls[0]), _timing(times.second, times.calls[1])
    return Measurement(
        batch_size=batch_size,
        threads=threads,
        original=original,
        fused=fused,
        speedup=ratio.value,
        low=ratio.low,
        high=ratio.high,
        warnings=(
            *_warnings("original", original),
            *_warnings("fused network", fused),
            *_too_few(len(times.first), rounds),
        ),
    )


def _timing(times: tuple[float, ...], calls: int) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), calls, times)


def _warnings(name: str, timing: Timing) -> Iterator[str]:
    if timing.median < OVERHEAD:
        yield (
            f"A call of the {name} takes less than {OVERHEAD * 1e6:.0f} microseconds, mostly the overhead of "
            "calling it: use a larger input or batch."
        )
    if timing.median * timing.calls < SHORTEST / 2:
        yield f"The timings of the {name} are too short for the clock: use a larger input or batch."
    found = outliers(timing.times)
    if found and timing.times[0] == timing.slowest:
        yield f"The first timing of the {name} was much slower than the others: it was not warm yet."
    elif found:
        yield (
            f"{found} of {len(timing.times)} timings of the {name} are outliers, so something else was running: "
            "repeat this on a quiet machine."
        )


def _too_few(done: int, rounds: int) -> Iterator[str]:
    if done < min(rounds, 2 * FEWEST_ROUNDS):
        yield f"Only {done} of {rounds} rounds fitted in the time: allow more for a narrower interval."
