"""Differences between two networks' outputs, as plain data. No torch here.

``original`` is the reference, ``fused`` the network that should compute the same. All errors are of ``fused``
against ``original``. Per output: ``max`` is max|a - b| / max|a|, ``rms`` is ||a - b|| / ||a|| (Euclidean).
Both divide by a property of the whole output, so elements near 0 do no harm; both are 0 where a and b are
equal and infinite where a is 0 everywhere and b is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repfuse.jsonready import json_ready


@dataclass(frozen=True)
class Level:
    """A relative difference of one output, in the two norms of this module: ``rms`` and ``max``."""

    rms: float
    max: float

    def exceeds(self, allowed: Level) -> bool:
        """Whether either norm is above ``allowed``."""
        return not (self.rms <= allowed.rms and self.max <= allowed.max)

    def over(self, allowed: Level) -> float:
        """Return the larger of the two quotients self / allowed (0 where both are 0)."""
        return max(_quotient(self.rms, allowed.rms), _quotient(self.max, allowed.max))


@dataclass(frozen=True)
class OutputError:
    """The difference of one output, over its finite elements.

    ``max_abs`` is max|a - b|, which is also the smallest absolute tolerance that passes; ``smallest_rtol``
    the smallest purely relative one, max(|a - b| / |a|), or None where no finite one passes; ``scale``
    max|a|; ``quantiles`` of |a - b| by percentage ("50", "90", "99", "100"); ``worst`` the index of the
    largest difference, ``values`` a and b there; ``non_finite`` how many elements are infinite or not a
    number, in the same places in both.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    relative: Level
    max_abs: float
    scale: float
    quantiles: dict[str, float]
    smallest_rtol: float | None
    worst: tuple[int, ...]
    values: tuple[float, float]
    non_finite: int


@dataclass(frozen=True)
class TrialComparison:
    """Both networks on one set of inputs.

    ``mismatch`` says what differs that is no number: structure, shape, dtype, a NaN in one only, an input
    that only the fused network refuses. ``skipped`` is why this trial is none for both networks.
    """

    label: str
    shapes: tuple[tuple[int, ...], ...]
    outputs: tuple[OutputError, ...] = ()
    mismatch: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Comparison:
    """Both networks in float64 on several trials, against one relative ``tolerance`` on the max norm."""

    trials: tuple[TrialComparison, ...]
    tolerance: float

    @property
    def worst(self) -> tuple[TrialComparison, OutputError] | None:
        """The output with the largest relative error, and its trial; None where nothing could be compared."""
        pairs = [(trial, output) for trial in self.trials for output in trial.outputs]
        return max(pairs, key=lambda pair: pair[1].relative.max, default=None)

    @property
    def by_output(self) -> list[tuple[TrialComparison, OutputError]]:
        """Of each output the largest relative error, with its trial."""
        worst: dict[str, tuple[TrialComparison, OutputError]] = {}
        for trial in self.trials:
            for output in trial.outputs:
                if output.name not in worst or output.relative.max > worst[output.name][1].relative.max:
                    worst[output.name] = (trial, output)
        return list(worst.values())

    @property
    def error(self) -> float | None:
        """The largest relative error of any output in any trial."""
        return self.worst[1].relative.max if self.worst else None

    @property
    def mismatches(self) -> tuple[TrialComparison, ...]:
        """The trials in which something other than a number differs."""
        return tuple(trial for trial in self.trials if trial.mismatch)

    @property
    def skipped(self) -> tuple[TrialComparison, ...]:
        """The trials that are none for both networks."""
        return tuple(trial for trial in self.trials if trial.skipped)

    @property
    def compared(self) -> tuple[TrialComparison, ...]:
        """The trials in which both networks gave outputs of the same form."""
        return tuple(trial for trial in self.trials if not trial.skipped and not trial.mismatch)

    @property
    def passed(self) -> bool:
        """Whether something was compared, nothing mismatched and every error is within the tolerance."""
        return not self.mismatches and self.error is not None and self.error <= self.tolerance

    @property
    def reason(self) -> str:
        """One sentence: what decided ``passed``."""
        if self.mismatches:
            return f"{self.mismatches[0].label}: {self.mismatches[0].mismatch}."
        if self.worst is None:
            return "Nothing could be compared."
        trial, output = self.worst
        side = "within" if self.passed else "above"
        return (
            f"In float64 the largest error is {output.relative.max:.1e} of the output's scale "
            f"({trial.label}, {output.name}), {side} {self.tolerance:.0e}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        facts = {"passed": self.passed, "error": self.error, "reason": self.reason}
        return dict(json_ready(facts) | json_ready(self))


def _quotient(value: float, allowed: float) -> float:
    if value == 0:
        return 0.0
    return value / allowed if allowed else float("inf")
