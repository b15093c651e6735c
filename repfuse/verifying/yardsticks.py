"""The effect of rounding, measured on few trials.

Measuring takes several runs of a network, so it is done on the yardsticks: small inputs. The other trials borrow the
median of what was measured there, until somebody asks for more.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from torch import nn

from repfuse.verifying.copies import Outcome, Watch, unwatched
from repfuse.verifying.inputs import Trial
from repfuse.verifying.results import Level
from repfuse.verifying.rounding import Levels, on, rounding, summation, unchanged

Key = tuple[int, str]


class Yardsticks:
    """The effect of rounding on one network's outputs, relative, by position of the trial and name of the output.

    ``outcomes`` are what the network gives in float64 on ``trials``; ``other`` is the network that it is compared with:
    tensors that are the same in both were not rounded between them. The effect is relative to the outputs in ``scale``,
    of the same trials: the network's own, unless others are given.
    """

    def __init__(
        self,
        network: nn.Module,
        other: nn.Module,
        trials: Sequence[Trial],
        outcomes: Sequence[Outcome],
        *,
        watch: Watch = unwatched,
        scale: Sequence[Outcome] | None = None,
    ) -> None:
        self._network, self._trials, self._outcomes, self._watch = network, trials, outcomes, watch
        self._scale = outcomes if scale is None else scale
        self._exact = unchanged(network, other)
        self._levels: Levels = {}
        self._lent: list[tuple[Key, Level]] = []
        self.measured: set[int] = set()

    def measure_usual(self) -> None:
        """Measure on the yardsticks among the trials that the network took, or else on the cheapest of these."""
        taken = [position for position, outcome in enumerate(self._outcomes) if outcome.outputs]
        marked = [position for position in taken if self._trials[position].yardstick]
        if taken and not self._lent:
            self.measure(marked or [self.cheapest(taken)])
            self._lent = list(self._levels.items())

    def measure(self, positions: Iterable[int]) -> None:
        """Measure on the trials at these positions, where that was not done yet."""
        at = [position for position in positions if position not in self.measured]
        if not at:
            return
        run = on([self._trials[position] for position in at], self._watch)
        own, scale = ([each[position] for position in at] for each in (self._outcomes, self._scale))
        found = rounding(self._network, run, own, self._exact, scale)
        self._levels |= {(at[index], name): level for (index, name), level in found.items()}
        self.measured |= set(at)

    def order(self, position: int) -> Levels:
        """Return the effect of the order of summation on one trial."""
        found = summation(self._network, on([self._trials[position]], self._watch), [self._outcomes[position]])
        return {(position, name): level for (_, name), level in found.items()}

    def cheapest(self, positions: Iterable[int]) -> int:
        """Return the position of the trial that takes the least work."""
        return min(positions, key=lambda position: self._trials[position].work)

    def levels(self, keys: Iterable[Key]) -> Levels:
        """Return what was measured, and for the rest of the keys the median of the yardsticks.

        What was measured elsewhere, where there was doubt, is lent to nobody.
        """
        return {key: self._levels.get(key) or self._borrowed(key[1]) for key in keys}

    def _borrowed(self, name: str) -> Level:
        levels = [level for (_, other), level in self._lent if other == name] or [level for _, level in self._lent]
        return Level(statistics.median(x.rms for x in levels), statistics.median(x.max for x in levels))
