"""What was found about two networks, as plain data. No torch here.

The errors are those of ``repfuse.verifying.differences``: of the fused network against the original, relative to the
whole output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from repfuse.jsonready import json_ready
from repfuse.verifying.differences import Comparison, Level, OutputError, TrialComparison

__all__ = [
    "Comparison",
    "Drift",
    "FirstDifference",
    "Flips",
    "Level",
    "OutputDrift",
    "OutputError",
    "OutputVerdict",
    "Proven",
    "RealData",
    "ToleranceCheck",
    "TrialComparison",
    "Verdict",
    "Verification",
    "Verified",
    "Worst",
]

Verdict = Literal["same", "different", "could-not-tell"]
EXIT_CODES: dict[Verdict, int] = {"same": 0, "different": 1, "could-not-tell": 2}


@dataclass(frozen=True)
class OutputDrift:
    """One output of one trial, computed in each network's own dtype, against the original in float64.

    ``own`` is the original's error, ``fused`` the fused network's; ``rounding`` the measured effect of
    rounding each changed weight once; ``allowed`` what arithmetic explains (see repfuse.verifying.drift).
    """

    trial: str
    name: str
    dtype: str
    own: Level
    fused: Level
    rounding: Level
    allowed: Level

    @property
    def ratio(self) -> float | None:
        """The fused network's rms error in units of the original's; None where the original has none."""
        return self.fused.rms / self.own.rms if self.own.rms else None

    @property
    def passed(self) -> bool:
        """Whether the fused network's error is explained."""
        return not self.fused.exceeds(self.allowed)


@dataclass(frozen=True)
class Drift:
    """The difference in the networks' own dtype. ``problem`` says why it failed or could not be measured, if so.

    ``measured`` is False where the networks cannot run in their own dtype on this device (half precision on a CPU).
    """

    outputs: tuple[OutputDrift, ...]
    measured: bool = True
    problem: str = ""

    @property
    def worst(self) -> OutputDrift | None:
        """The output that comes closest to what is allowed, or furthest above."""
        return max(self.outputs, key=lambda output: output.fused.over(output.allowed), default=None)

    @property
    def passed(self) -> bool:
        """Whether it was measured, and every output is explained by arithmetic."""
        return self.measured and not self.problem and all(output.passed for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return dict(json_ready({"passed": self.passed, "worst": self.worst}) | json_ready(self))


@dataclass(frozen=True)
class Verified:
    """A written file that was read again and run before it counted: in which ``runtime`` and on which inputs.

    ``shapes`` are those that the file takes, dynamic axes by name; ``refused`` the inputs that the original takes and
    the file does not, as its shapes say. ``error`` is the worst output's rms error relative to the original in float64,
    ``own`` the original's own there, ``allowed`` what arithmetic explains; they are None where the outputs are
    ``identical``: bit by bit those of the network that was written. ``where`` is a fresh process, or this one and why.
    ``tensors`` counts those that were compared bit by bit, ``alone`` says whether torch.load reads the file with
    repfuse out of reach (None where that was not tried), ``seconds`` what all this took.
    """

    runtime: str
    shapes: tuple[str, ...]
    compared: tuple[str, ...]
    refused: tuple[str, ...]
    error: float | None = None
    own: float | None = None
    allowed: float | None = None
    where: str = ""
    tensors: int = 0
    identical: bool = False
    alone: bool | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class OutputVerdict:
    """One output's row: its worst trial in float64, what rounding explains there, and its worst drift."""

    name: str
    trial: str
    error: OutputError
    rounding: Level
    allowed: Level
    drift: OutputDrift | None


@dataclass(frozen=True)
class FirstDifference:
    """Where the networks part: the first module, by path, whose output differs and that nothing after puts right.

    ``after`` is the module before it, in the order of execution, whose output still agrees ("" where there is none).
    ``unit`` is what ``error`` and ``allowed`` count.
    """

    path: str
    after: str
    trial: str
    error: Level
    allowed: Level
    unit: str = "relative error"


@dataclass(frozen=True)
class Flips:
    """The ``samples`` that the networks put in different classes.

    With labels: how many of them the original alone has right, and how many the fused network alone. The margins are
    the original's on these samples, its highest output less its second, relative to the largest magnitude of that
    sample's outputs: the smallest and the largest. A flip at a margin of the size of the drift is no mistake.
    """

    samples: int
    right_to_wrong: int | None
    wrong_to_right: int | None
    smallest_margin: float | None
    largest_margin: float | None


@dataclass(frozen=True)
class RealData:
    """What both networks say of real inputs, in their own dtype. ``None`` where it does not apply.

    ``samples`` in all, of which the first ``compared`` also took part in the float64 comparison. The agreements and
    accuracies are fractions of the samples: top 1 is the class with the highest output (the lowest number among equal
    ones), top 5 the set of the five highest, for more than five classes. ``without_class`` samples have an output
    that is not a number in one of the networks: there they do not agree. ``notes`` say how the inputs were made.
    """

    samples: int
    compared: int
    top1_agreement: float | None
    accuracy_original: float | None
    accuracy_fused: float | None
    top5_agreement: float | None = None
    top5_accuracy_original: float | None = None
    top5_accuracy_fused: float | None = None
    flips: Flips | None = None
    without_class: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Worst:
    """The output that is furthest off, and its largest |a - b| / (atol + rtol |a|): above 1, it is too far."""

    trial: str
    name: str
    excess: float


@dataclass(frozen=True)
class ToleranceCheck:
    """The tolerances that the user gave, and how far the worst outputs are off: in float64, and as stored.

    ``None`` where there was nothing to compare: no output, or a dtype that does not run here. ``arithmetic`` is the
    verdict that there would have been without them, ``reason`` its reason.
    """

    rtol: float
    atol: float
    float64: Worst | None
    stored: Worst | None
    arithmetic: Verdict
    reason: str

    @property
    def passed(self) -> bool:
        """Whether every element is within the tolerances."""
        return all(worst is None or worst.excess <= 1 for worst in (self.float64, self.stored))


class Proven(Protocol):
    """What a proof of the plan that made one network from the other found; see ``repfuse.proof``."""

    @property
    def passed(self) -> bool:
        """Whether every part holds."""

    @property
    def reason(self) -> str:
        """One sentence: what decided."""

    @property
    def place(self) -> FirstDifference | None:
        """The first site that fails."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""


@dataclass(frozen=True)
class Verification:
    """The verdict on two networks, in one sentence (``reason``) and in numbers.

    ``dtypes`` are those in which most numbers of the original and of the fused network are stored; ``trials``
    all that was compared in float64, with the weights as they are stored; ``outputs`` one row per output.
    ``tolerances`` are those that overruled arithmetic, if any; ``effort`` is how much was tried. ``proof`` is there
    where the plan is known that made one network from the other.
    """

    verdict: Verdict
    reason: str
    dtypes: tuple[str, str]
    outputs: tuple[OutputVerdict, ...]
    trials: tuple[TrialComparison, ...]
    drift: Drift | None
    first_difference: FirstDifference | None = None
    data: RealData | None = None
    notes: tuple[str, ...] = ()
    tolerances: ToleranceCheck | None = None
    effort: str = "default"
    proof: Proven | None = None

    @property
    def exit_code(self) -> int:
        """0 same, 1 different, 2 could not tell."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        parts = {
            name: part.to_dict() if part else None for name, part in (("proof", self.proof), ("drift", self.drift))
        }
        return dict(json_ready(replace(self, proof=None, drift=None)) | parts)
