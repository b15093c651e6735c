"""Timing calls in rounds. The clock is a parameter, so that the tests need not wait for one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]
Call = Callable[[], None]

SHORTEST = 5e-3  # seconds: one timing lasts at least this long, thousands of times the resolution of the clock
MOST_CALLS = 10_000
WARM_UP = 3
FEWEST_ROUNDS = 4  # two in each order


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of both networks, by round; ``calls`` the calls in a row of which each is the mean."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    calls: tuple[int, int]


def time_rounds(
    first: Call,
    second: Call,
    clock: Clock,
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[float], None],
) -> Rounds:
    """Time both calls, warm and interleaved: each round times both, every other round in reverse order (ABBA).

    So a drift of the machine's speed falls on both alike. Stops after ``rounds`` rounds, or after the first
    even number of rounds that fills ``seconds``, warm-up included, and no sooner than FEWEST_ROUNDS.
    """
    end = clock() + seconds
    calls = (_calibrate(first, clock), _calibrate(second, clock))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and number % 2 == 0 and clock() >= end:
            break
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times[which].append(time_calls((first, second)[which], calls[which], clock))
        progress((number + 1) / rounds)
    return Rounds(tuple(times[0]), tuple(times[1]), calls)


def time_calls(call: Call, calls: int, clock: Clock) -> float:
    """Return the mean seconds of ``calls`` calls in a row."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def _calibrate(call: Call, clock: Clock) -> int:
    """Warm up, and return how many calls in a row last SHORTEST, judged by the fastest of them."""
    once = min(time_calls(call, 1, clock) for _ in range(WARM_UP))
    return min(MOST_CALLS, math.ceil(SHORTEST / once)) if once > 0 else MOST_CALLS
