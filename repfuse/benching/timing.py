"""Timing calls in rounds, and what the times say: the ratio of two medians, or their difference, and how sure it is.

The clock is a parameter, so that the tests need not wait for one.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from repfuse.benching.results import Gain, Measurement, Ratio, Timing
from repfuse.checking.inputs import Example
from repfuse.errors import RepfuseError
from repfuse.networks import as_before, set_eval
from repfuse.recording.copies import restored

Clock = Callable[[], float]
TimedCall = Callable[[], Any]

SHORTEST = 5e-3  # seconds: one timing lasts at least this long, thousands of times the resolution of the clock
MOST_CALLS = 10_000
WARM_UP = 2
MOST_WARM_UP = 30
STABLE = 0.05  # a network is warm whose last calls, by their median, are as fast as its fastest, by this much
FEWEST_ROUNDS = 8  # with fewer, fewer than 95 % of the intervals hold the ratio


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of each network, by round; ``calls`` the calls in a row of which each is the mean."""

    times: tuple[tuple[float, ...], ...]
    calls: tuple[int, ...]


def time_rounds(
    calls: Sequence[TimedCall], clock: Clock, *, rounds: int, seconds: float, progress: Callable[[float], None]
) -> Rounds:
    """Time all calls, warm and interleaved: each round times each of them once.

    The order is drawn anew for every other round, and turned around in the next one: so a drift of the machine's speed,
    and what a call leaves behind in its caches, fall on all alike. Stops after ``rounds`` rounds, or after the first
    even number of rounds that fills ``seconds``, warm-up included, and no sooner than FEWEST_ROUNDS.
    """
    end, draw = clock() + seconds, random.Random(0)
    counts = [_calibrate(call, clock, end) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    order = [*range(len(calls))]
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and number % 2 == 0 and clock() >= end:
            break
        if number % 2 == 0:
            draw.shuffle(order)
        for which in order if number % 2 == 0 else reversed(order):
            times[which].append(time_calls(calls[which], counts[which], clock))
        progress((number + 1) / rounds)
    return Rounds(tuple(map(tuple, times)), tuple(counts))


def time_calls(call: TimedCall, calls: int, clock: Clock) -> float:
    """Return the mean seconds of ``calls`` calls in a row."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def _calibrate(call: TimedCall, clock: Clock, end: float) -> int:
    """Warm up until calls get no faster, and return how many in a row last SHORTEST, judged by the fastest of them."""
    once = [time_calls(call, 1, clock) for _ in range(WARM_UP)]
    while median(once[-WARM_UP:]) > (1 + STABLE) * min(once) and len(once) < MOST_WARM_UP and clock() < end:
        once.append(time_calls(call, 1, clock))
    fastest = min(once)
    return min(MOST_CALLS, math.ceil(SHORTEST / fastest)) if fastest > 0 else MOST_CALLS


# The conditions of a measurement: eval mode, threads, batch sizes, and a clock that waits for the device.


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put the networks in eval mode, and leave them afterwards as they were: their modes, what they cached, what they
    counted in buffers, and the random numbers.
    """
    with ExitStack() as stack:
        for network in networks:
            for buffer in network.buffers():
                stack.callback(buffer.detach().copy_, buffer.clone())
            stack.enter_context(as_before(network))
            stack.enter_context(restored(network))
            set_eval(network)
        yield


def batched(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Return inputs of ``size`` samples: those given, repeated or cut off.

    Tensors whose first axis is as long as the batch follow; others stay.
    """
    batch = Example(inputs).batch or 0

    def repeated(x: Any) -> Any:
        follows = isinstance(x, torch.Tensor) and x.dim() and len(x) == batch
        return x[torch.arange(size, device=x.device) % batch] if follows else x

    return tuple(tree_map(repeated, inputs)) if batch else inputs


def at_least(least: int, name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return the values, each once. Raises RepfuseError where there is none or one is less than ``least``."""
    if not values or min(values) < least:
        given = ", ".join(map(str, values)) or "empty"
        raise RepfuseError(f"{name} cannot be {given}.", "", f"Give at least {least}.")
    return tuple(dict.fromkeys(values))


def device_clock(clock: Clock, device: torch.device) -> Clock:
    """Return the clock, or on CUDA one that adds up the times between events on the device.

    A reading waits until the device has done what it was given before, and for what ``clock`` waits for. It stops the
    clock: until the host hears that the device is done, and comes to its next call, no time passes.
    """
    if device.type != "cuda":
        return clock
    last, seconds = _recorded(device), 0.0

    def read() -> float:
        nonlocal last, seconds
        clock()
        now = _recorded(device)
        torch.cuda.synchronize(device)
        seconds += float(last.elapsed_time(now)) / 1e3  # of single precision: exact enough from one reading to the next
        last = _recorded(device)
        return seconds

    return read


def _recorded(device: torch.device) -> torch.cuda.Event:
    """Return an event that happens when the device has done what it was given before."""
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
    return event


# What times say. The interval is a percentile bootstrap: the middle CONFIDENCE of what RESAMPLES draws, with
# replacement, give. The draws are seeded: the same times give the same interval.

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
OUTLIER = 1.4826 * 10  # hyperfine's: ten standard deviations, estimated by the median absolute deviation


def ratio_of_medians(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return median(first) / median(second) with its interval.

    ``first`` and ``second`` are positive times of the same rounds, at least two. Both times of a round are drawn
    together, because what disturbs a round disturbs both.
    """
    return Ratio(*_with_interval(operator.truediv, first, second, paired=True))


def difference_of_medians(first: Sequence[float], second: Sequence[float]) -> Gain:
    """Return median(first) - median(second), likewise."""
    return Gain(*_with_interval(operator.sub, first, second, paired=True))


def ratio_of_samples(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return the ratio for times of two runs, which nothing pairs: each is drawn from by itself."""
    return Ratio(*_with_interval(operator.truediv, first, second, paired=False))


def _with_interval(
    by: Callable[[Any, Any], Any], first: Sequence[float], second: Sequence[float], *, paired: bool
) -> tuple[float, float, float]:
    if min(len(first), len(second)) < 2 or (paired and len(first) != len(second)):
        raise ValueError("two times at least, in pairs" if paired else "two times at least, of each run")
    generator = torch.Generator().manual_seed(SEED)
    of_first = torch.randint(len(first), (RESAMPLES, len(first)), generator=generator)
    of_second = of_first if paired else torch.randint(len(second), (RESAMPLES, len(second)), generator=generator)
    both = ((first, of_first), (second, of_second))
    drawn = by(*(torch.tensor(x, dtype=torch.float64)[draws].quantile(0.5, dim=-1) for x, draws in both))
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return by(median(first), median(second)), low, high


def outliers(times: Sequence[float]) -> int:
    """Return how many times lie more than OUTLIER median absolute deviations above the median."""
    middle = median(times)
    deviation = median(abs(time - middle) for time in times)
    return sum(time - middle > OUTLIER * deviation for time in times) if deviation else 0


def drift(times: Sequence[float]) -> float:
    """Return how many times as slow the second half of the rounds was as the first."""
    half = len(times) // 2
    return median(times[-half:]) / median(times[:half]) if half else 1.0


# A measurement, with its warnings.

OVERHEAD = 50e-6  # seconds: a call this short is mostly Python's and torch's own bookkeeping
DRIFTS = 1.1  # times as slow, or as fast, as in the first half of the rounds


def judge(original: Timing, fused: Timing, *, rounds: int, **setting: Any) -> Measurement:
    """Return the speed-up with its interval, and warnings; ``rounds`` is the number asked for, ``setting`` the rest."""
    ratio = ratio_of_medians(original.times, fused.times)
    return Measurement(
        original=original,
        fused=fused,
        speedup=ratio.value,
        low=ratio.low,
        high=ratio.high,
        warnings=tuple(_warnings(original, fused, rounds)),
        **setting,
    )


def _warnings(original: Timing, fused: Timing, rounds: int) -> Iterator[str]:
    for name, timing in (("original", original), ("fused network", fused)):
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
    ratios = drift(original.times), drift(fused.times)
    if min(ratios) > DRIFTS or max(ratios) < 1 / DRIFTS:  # the ratios hold, since both were timed in each round
        change, word = (min(ratios), "slower") if min(ratios) > 1 else (max(ratios), "faster")
        share = abs(change - 1)
        yield f"The machine got {share:.0%} {word} during the measurement: trust the ratio more than the times."
    done = len(original.times)
    if done < min(rounds, 2 * FEWEST_ROUNDS):
        yield f"Only {done} of {rounds} rounds fitted in the time: allow more for a narrower interval."
