"""Benchmarks that need not take long: no timing in a test is a verdict."""

from __future__ import annotations

from repfuse.benching import timing

SHORTEST = 2.5e-4
"""Seconds that one timing lasts at least, a twentieth of what it does for users."""


def time_briefly() -> None:
    """Let timings be as short in this process and its copies."""
    timing.SHORTEST = SHORTEST
    from repfuse.benching import benchmark  # after that: others import the number

    benchmark.SIDES["cpu"] = 64


class Ticks:
    """A clock that moves by a fixed step each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now
