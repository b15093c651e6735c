"""What rounding explains, measured on few trials and, where these do not settle it, on the one in question.

Measuring takes several runs of each network, so it is done on the yardsticks: small inputs. The other trials borrow
the median of what was measured there. Where an error exceeds what was borrowed, the effect is measured on that very
trial before anything is judged, and that of the order of summation with it; the cheapest first, until one error stands.
So a correct network is never flagged by another input's yardstick, and a wrong one never excused by the largest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from torch import nn

from repfuse.verifying.copies import Outcome, Watch, run_float64
from repfuse.verifying.inputs import Trial
from repfuse.verifying.results import Level
from repfuse.verifying.rounding import Levels, Run, allowed, combine, rounding, summation, unchanged

Key = tuple[int, str]
Outcomes = Sequence[Outcome]
NONE = Level(0.0, 0.0)


class Yardsticks:
    """The effect of rounding on one network's outputs, relative, by position of the trial and name of the output.

    ``outcomes`` are what the network, widened to float64, gives on ``trials``; ``other`` is the network that it is
    compared with: tensors that are the same in both were not rounded between them.
    """

    def __init__(
        self, network: nn.Module, other: nn.Module, trials: Sequence[Trial], outcomes: Outcomes, watch: Watch
    ) -> None:
        self._network, self._trials, self._outcomes, self._watch = network, trials, outcomes, watch
        self._exact = unchanged(network, other)
        self._levels: Levels = {}

    @property
    def measured(self) -> set[int]:
        """The positions at which it was measured."""
        return {position for position, _ in self._levels}

    def measure(self, positions: Iterable[int]) -> None:
        """Measure on the trials at these positions, where that was not done yet."""
        at = [position for position in positions if position not in self.measured]
        if not at:
            return
        trials = [self._trials[position] for position in at]
        outcomes = [self._outcomes[position] for position in at]
        found = rounding(self._network, _on(trials, self._watch), outcomes, self._exact)
        self._levels |= {(at[index], name): level for (index, name), level in found.items()}

    def levels(self, keys: Iterable[Key]) -> Levels:
        """Return what was measured, and for the rest of the keys the median of it."""
        return {key: self._levels.get(key) or self._borrowed(key[1]) for key in keys}

    def _borrowed(self, name: str) -> Level:
        levels = [level for (_, other), level in self._levels.items() if other == name] or [*self._levels.values()]
        return Level(statistics.median(x.rms for x in levels), statistics.median(x.max for x in levels))


class Explained:
    """The ``errors`` of a network that should compute what another does, against what rounding explains of them.

    ``sides`` are both networks with their outcomes in float64 on ``trials``.
    """

    def __init__(
        self, sides: Sequence[tuple[nn.Module, Outcomes]], trials: Sequence[Trial], errors: Levels, watch: Watch
    ) -> None:
        (original, before), (fused, after) = sides
        self.errors, self._trials, self._watch = errors, trials, watch
        self._fused, self._after = fused, after
        self.original = Yardsticks(original, fused, trials, before, watch)
        self.fused = Yardsticks(fused, original, trials, after, watch)
        self.settled: set[int] = set()
        self._order: Levels = {}

    def measure(self) -> None:
        """Measure on the yardsticks, then wherever an error is above what is explained so far."""
        for side in (self.original, self.fused):
            side.measure(yardsticks(self._trials))
        while doubtful := {position for position, _ in self.excessive()}:
            if not doubtful.isdisjoint(self.settled):
                return
            self.settle(min(doubtful, key=lambda position: self._trials[position].work))

    def settle(self, position: int) -> None:
        """Measure all there is on one trial."""
        for side in (self.original, self.fused):
            side.measure([position])
        run = _on([self._trials[position]], self._watch)
        found = summation(self._fused, run, [self._after[position]])
        self._order |= {(position, name): level for (_, name), level in found.items()}
        self.settled.add(position)

    def excessive(self) -> list[Key]:
        """Return where an error is above what is explained so far."""
        limits = self.limits()
        return [key for key in self.errors if excess(self.errors[key], limits[key]) > 1]

    def limits(self) -> Levels:
        """Return what is allowed, by what was measured so far."""
        return allowed(self._effects())

    def effect(self) -> Levels:
        """Return the effect of rounding alone."""
        effects = self._effects()
        return {key: combine([each[key] for each in effects]) for key in self.errors}

    def _effects(self) -> list[Levels]:
        order = {key: self._order.get(key, NONE) for key in self.errors}
        return [self.original.levels(self.errors), self.fused.levels(self.errors), order]


def excess(error: Level, limit: Level) -> float:
    """Return an error in units of what is allowed: above 1, it is not explained. Of no limit, nothing is too much."""
    times = error.over(limit)
    return 0.0 if math.isnan(times) else times


def yardsticks(trials: Sequence[Trial]) -> list[int]:
    """Return the positions of the trials on which rounding is measured in any case: one at least, the cheapest."""
    marked = [position for position, trial in enumerate(trials) if trial.yardstick]
    return marked or [min(range(len(trials)), key=lambda position: trials[position].work)]


def _on(trials: Sequence[Trial], watch: Watch) -> Run:
    return lambda network, change: run_float64(network, trials, change, watch)
