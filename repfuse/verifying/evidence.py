"""Everything that a verdict on two networks rests on, gathered once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from repfuse.progress import Progress
from repfuse.verifying.comparison import answers_in_float64, reference, tabulate
from repfuse.verifying.copies import Outcome
from repfuse.verifying.drift import drift_from
from repfuse.verifying.inputs import Trial
from repfuse.verifying.measure import informative, level
from repfuse.verifying.results import Drift, OutputError, OutputVerdict, TrialComparison
from repfuse.verifying.rounding import FLOAT64_NOISE, Levels, allowed, combine, rounding_on, unchanged

Key = tuple[int, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Evidence:
    """What was measured. Keys are a position in ``trials`` and the name of an output.

    ``table`` holds a row per trial that was tried, ``trials`` only those in which both networks gave outputs
    of the same form; ``outcomes`` are the original's in float64.
    """

    table: tuple[TrialComparison, ...]
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    errors: Levels
    rounding: Levels
    limits: Levels
    drift: Drift | None

    @property
    def worst(self) -> Key:
        """The output that comes closest to its limit, or furthest above."""
        return max(self.errors, key=self.excess)

    def excess(self, key: Key) -> float:
        """Return the error in units of what is allowed."""
        return self.errors[key].over(self.limits[key])

    @property
    def informative(self) -> bool:
        """Whether any output has a finite number other than 0."""
        return any(informative(self.outcomes[position].outputs[name]) for position, name in self.errors)

    def rows(self) -> tuple[OutputVerdict, ...]:
        """Return a row per output: its worst trial, and its worst drift."""
        names = dict.fromkeys(name for _, name in self.errors)
        return tuple(self._row(name) for name in names)

    def _row(self, name: str) -> OutputVerdict:
        key = max((key for key in self.errors if key[1] == name), key=self.excess)
        label = self.trials[key[0]].label
        drifts = [row for row in self.drift.outputs if row.name == name] if self.drift else []
        worst = max(drifts, key=lambda row: row.fused.over(row.allowed), default=None)
        return OutputVerdict(name, label, self._error(label, name), self.rounding[key], self.limits[key], worst)

    def _error(self, label: str, name: str) -> OutputError:
        outputs = next(row.outputs for row in self.table if row.label == label)
        return next(output for output in outputs if output.name == name)


def gather(original: nn.Module, fused: nn.Module, trials: Sequence[Trial], progress: Progress) -> Evidence:
    """Run both networks in float64 and as they are stored, and measure what rounding explains.

    Raises RepfuseError where the original cannot run the first trial in float64.
    """
    progress("the original in float64", 0.0)
    expected = reference(original, trials)
    progress("the fused network in float64", 0.1)
    found = answers_in_float64(fused, trials, expected)
    table = tabulate(trials, expected, found, FLOAT64_NOISE).trials
    kept = [position for position, row in enumerate(table) if not row.skipped and not row.mismatch]
    trials, expected, found = _at(trials, kept), _at(expected, kept), _at(found, kept)
    errors = {
        (position, name): level(tensor, found[position].outputs[name])
        for position, outcome in enumerate(expected)
        for name, tensor in outcome.outputs.items()
    }
    if not errors:
        return Evidence(table, (), (), {}, {}, {}, None)
    effects = _effects(original, fused, trials, (expected, found), progress)
    effect = {key: combine([each[key] for each in effects]) for key in errors}
    progress("drift", 0.8)
    drift = drift_from(original, fused, trials, expected, effect)
    return Evidence(table, tuple(trials), tuple(expected), errors, effect, allowed(effects), drift)


def _at(items: Sequence[T], positions: Sequence[int]) -> list[T]:
    return [items[position] for position in positions]


def _effects(
    original: nn.Module,
    fused: nn.Module,
    trials: Sequence[Trial],
    outcomes: tuple[Sequence[Outcome], Sequence[Outcome]],
    progress: Progress,
) -> list[Levels]:
    progress("what rounding explains in the original", 0.2)
    first = rounding_on(original, trials, outcomes[0], unchanged(original, fused))
    progress("what rounding explains in the fused network", 0.5)
    return [first, rounding_on(fused, trials, outcomes[1], unchanged(fused, original), outcomes[0])]
