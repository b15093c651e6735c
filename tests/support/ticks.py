"""A clock for benchmarks that need not wait."""

from __future__ import annotations


class Ticks:
    """A clock that moves by a fixed step each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now
