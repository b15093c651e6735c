"""Everything that a verdict on two networks rests on, gathered once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from repfuse.checking.comparison import answers_in_float64, informative, level, tabulate, with_fallbacks
from repfuse.checking.drift import drift
from repfuse.checking.results import Drift, OutputError, OutputVerdict, TrialComparison
from repfuse.checking.rounding import Levels, RoundingEffects, allowed, combined, excess, explained
from repfuse.checking.runs import Key, Outcome, by_key, narrow_in
from repfuse.checking.trial import Trial
from repfuse.wording import Progress

MEASURED = 0.75  # of the whole: real data, the sites and the place of a difference follow
T = TypeVar("T")


@dataclass(frozen=True)
class Evidence:
    """What was measured. Keys are a position in ``trials`` and the name of an output.

    ``table`` holds a row per trial that was tried, ``trials`` only those in which both networks gave outputs
    of the same form; ``outcomes`` are the original's in float64, ``answers`` the fused network's. ``settled`` are the
    positions on which everything was measured that could explain an error; where one is too large and settled, others
    need not be. ``tried`` are all trials with the original's outcomes.
    """

    table: tuple[TrialComparison, ...]
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    answers: tuple[Outcome, ...]
    errors: Levels
    rounding: Levels
    limits: Levels
    drift: Drift | None
    settled: frozenset[int] = frozenset()
    tried: tuple[tuple[Trial, Outcome], ...] = ()

    @property
    def worst(self) -> Key:
        """The output that comes closest to its limit, or furthest above; where errors stand, one of these."""
        return max(self.errors, key=self._rank)

    def excess(self, key: Key) -> float:
        """Return the error in units of what is allowed."""
        return excess(self.errors[key], self.limits[key])

    @property
    def narrow(self) -> tuple[str, ...]:
        """The modules of either network that have no float64, and ran in their own dtype."""
        return narrow_in((*self.outcomes, *self.answers))

    @property
    def mismatched(self) -> TrialComparison | None:
        """The first trial on which something differs that is no number."""
        return next((row for row in self.table if row.mismatch), None)

    @property
    def vacuous(self) -> list[str]:
        """The outputs that have no finite number other than 0 on any trial: to agree in these says nothing."""
        names = dict.fromkeys(name for _, name in self.errors)
        telling = {name for (_, name), output in by_key(self.outcomes).items() if informative(output)}
        return [name for name in names if name not in telling]

    @property
    def informative(self) -> bool:
        """Whether any output has a finite number other than 0."""
        return len(self.vacuous) < len({name for _, name in self.errors})

    def rows(self) -> tuple[OutputVerdict, ...]:
        """Return a row per output: its worst trial, and its worst drift."""
        names = dict.fromkeys(name for _, name in self.errors)
        return tuple(self._row(name) for name in names)

    def _rank(self, key: Key) -> tuple[bool, float]:
        times = self.excess(key)
        return times > 1 and key[0] in self.settled, times

    def _row(self, name: str) -> OutputVerdict:
        key = max((key for key in self.errors if key[1] == name), key=self._rank)
        label = self.trials[key[0]].label
        worst = self.drift.by_output.get(name) if self.drift else None
        return OutputVerdict(name, label, self._error(label, name), self.rounding[key], self.limits[key], worst)

    def _error(self, label: str, name: str) -> OutputError:
        outputs = next(row.outputs for row in self.table if row.label == label)
        return next(output for output in outputs if output.name == name)


def gather(original: nn.Module, fused: nn.Module, trials: Sequence[Trial], progress: Progress) -> Evidence:
    """Run both networks in float64 and as they are stored, and measure what rounding explains.

    Raises RepfuseError where the original cannot run the first trial in float64.
    """
    progress("the original in float64", 0.0)
    trials, expected = with_fallbacks(original, trials)
    progress("the fused network in float64", 0.1)
    found = answers_in_float64(fused, trials, expected)
    table = tabulate(trials, expected, found).trials
    tried = tuple(zip(trials, expected, strict=True))
    kept = [position for position, row in enumerate(table) if not row.skipped and not row.mismatch]
    trials, expected, found = _at(trials, kept), _at(expected, kept), _at(found, kept)
    answers = by_key(found)
    errors = {key: level(x, answers[key]) for key, x in by_key(expected).items()}
    if not errors:
        return Evidence(table, (), (), (), {}, {}, {}, None, tried=tried)
    progress("what rounding explains", 0.2)
    before = RoundingEffects(original, fused, trials, expected)
    after = RoundingEffects(fused, original, trials, found, scale=expected)
    effects, settled = explained(before, after, errors)
    progress("drift", 0.6)
    measured = drift(original, fused, trials, expected, effect=after)
    return Evidence(
        table,
        tuple(trials),
        tuple(expected),
        tuple(found),
        errors,
        combined(effects),
        allowed(effects),
        measured,
        frozenset(settled),
        tried,
    )


def _at(items: Sequence[T], positions: Iterable[int]) -> list[T]:
    return [items[position] for position in positions]
