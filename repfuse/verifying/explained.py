"""Errors in float64 against what rounding explains of them, measured where few yardsticks do not settle it.

Where an error exceeds what its trial borrowed, the effect of rounding is measured on that very trial before anything is
judged, and that of the order of summation with it; the cheapest first, until one error stands. So a correct network is
never flagged by another input's yardstick, and a wrong one never excused by the largest.
"""

from __future__ import annotations

import math

from repfuse.verifying.results import Level
from repfuse.verifying.rounding import Levels, allowed, combine
from repfuse.verifying.yardsticks import Key, Yardsticks

NONE = Level(0.0, 0.0)


class Explained:
    """The ``errors`` of a network that should compute what another does, against what rounding explains of them.

    ``original`` and ``fused`` are the effects of rounding on both.
    """

    def __init__(self, original: Yardsticks, fused: Yardsticks, errors: Levels) -> None:
        self.original, self.fused, self.errors = original, fused, errors
        self.settled: set[int] = set()
        self._order: Levels = {}

    def measure(self) -> None:
        """Measure on the yardsticks, then wherever an error is above what is explained so far."""
        for side in (self.original, self.fused):
            side.measure_usual()
        while doubtful := {position for position, _ in self.excessive()}:
            if not doubtful.isdisjoint(self.settled):
                return
            self.settle(self.fused.cheapest(doubtful))

    def settle(self, position: int) -> None:
        """Measure all there is on one trial."""
        for side in (self.original, self.fused):
            side.measure([position])
        self._order |= self.fused.order(position)
        self.settled.add(position)

    def excessive(self) -> list[Key]:
        """Return where an error is above what is explained so far."""
        limits = self.limits()
        return [key for key in self.errors if excess(self.errors[key], limits[key]) > 1]

    def limits(self) -> Levels:
        """Return what is allowed, by what was measured so far."""
        return allowed(self._effects())

    def effect(self) -> Levels:
        """Return the effect of rounding by what was measured so far."""
        effects = self._effects()
        return {key: combine([each[key] for each in effects]) for key in self.errors}

    def _effects(self) -> list[Levels]:
        order = {key: self._order.get(key, NONE) for key in self.errors}
        return [self.original.levels(self.errors), self.fused.levels(self.errors), order]


def excess(error: Level, limit: Level) -> float:
    """Return an error in units of what is allowed: above 1, it is not explained. Of no limit, nothing is too much."""
    times = error.over(limit)
    return 0.0 if math.isnan(times) else times
