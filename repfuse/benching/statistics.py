"""What times say: the ratio of two medians, or their difference, how sure it is, and what to be wary of."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

from repfuse.benching.clock import FEWEST_ROUNDS, SHORTEST
from repfuse.benching.results import Gain, Measurement, Ratio, Runtime, Timing

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
OUTLIER = 1.4826 * 10  # hyperfine's: ten standard deviations, estimated by the median absolute deviation


def ratio_of_medians(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return median(first) / median(second) with its percentile bootstrap interval.

    ``first`` and ``second`` are positive times of the same rounds, at least two. Rounds are drawn with
    replacement, both times of a round together, because what disturbs a round disturbs both; the interval
    holds the middle CONFIDENCE of the ratios of RESAMPLES draws. The draws are seeded: the same times give
    the same interval.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError("two times at least, in pairs")
    rounds = _draws(len(first), torch.Generator().manual_seed(SEED))
    return _ratio(first, rounds, second, rounds)


def difference_of_medians(first: Sequence[float], second: Sequence[float]) -> Gain:
    """Return median(first) - median(second) with the same interval."""
    rounds = _draws(len(first), torch.Generator().manual_seed(SEED))
    drawn = _medians(first, rounds) - _medians(second, rounds)
    return Gain(statistics.median(first) - statistics.median(second), *_middle(drawn))


def ratio_of_samples(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return the same of times of two runs, which nothing pairs: each is drawn from by itself."""
    if min(len(first), len(second)) < 2:
        raise ValueError("two times at least, of each run")
    generator = torch.Generator().manual_seed(SEED)
    return _ratio(first, _draws(len(first), generator), second, _draws(len(second), generator))


def _draws(length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(length, (RESAMPLES, length), generator=generator)


def _ratio(first: Sequence[float], of_first: torch.Tensor, second: Sequence[float], of_second: torch.Tensor) -> Ratio:
    drawn = _medians(first, of_first) / _medians(second, of_second)
    return Ratio(statistics.median(first) / statistics.median(second), *_middle(drawn))


def _medians(times: Sequence[float], drawn: torch.Tensor) -> torch.Tensor:
    return torch.tensor(times, dtype=torch.float64)[drawn].quantile(0.5, dim=-1)


def _middle(drawn: torch.Tensor) -> list[float]:
    tail = (1 - CONFIDENCE) / 2
    ends: list[float] = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return ends


def outliers(times: Sequence[float]) -> int:
    """Return how many times lie more than OUTLIER median absolute deviations above the median."""
    middle = statistics.median(times)
    deviation = statistics.median(abs(time - middle) for time in times)
    return sum(time - middle > OUTLIER * deviation for time in times) if deviation else 0


def drift(times: Sequence[float]) -> float:
    """Return how many times as slow the second half of the rounds was as the first."""
    half = len(times) // 2
    return statistics.median(times[-half:]) / statistics.median(times[:half]) if half else 1.0


# A measurement, with its warnings.

OVERHEAD = 50e-6  # seconds: a call this short is mostly Python's and torch's own bookkeeping


def judge(
    original: Timing, fused: Timing, *, batch_size: int, threads: int, rounds: int, runtime: str = Runtime.EAGER
) -> Measurement:
    """Return the speed-up with its interval, and warnings; ``rounds`` is the number asked for."""
    ratio = ratio_of_medians(original.times, fused.times)
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
            *_drifting(original, fused),
            *_too_few(len(original.times), rounds),
        ),
        runtime=runtime,
    )


def timing(times: tuple[float, ...], calls: int, floor: float | None = None) -> Timing:
    """Return what is said of times of ``calls`` calls in a row each."""
    return Timing(statistics.median(times), min(times), max(times), calls, times, floor)


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


DRIFTS = 1.1  # times as slow, or as fast, as in the first half of the rounds


def _drifting(*timings: Timing) -> Iterator[str]:
    """Warn where all got slower, or all faster: the ratios hold, since both were timed in each round; the times not."""
    ratios = [drift(each.times) for each in timings]
    if min(ratios) > DRIFTS or max(ratios) < 1 / DRIFTS:
        change, word = (min(ratios), "slower") if min(ratios) > 1 else (max(ratios), "faster")
        share = abs(change - 1)
        yield f"The machine got {share:.0%} {word} during the measurement: trust the ratio more than the times."


def _too_few(done: int, rounds: int) -> Iterator[str]:
    if done < min(rounds, 2 * FEWEST_ROUNDS):
        yield f"Only {done} of {rounds} rounds fitted in the time: allow more for a narrower interval."
