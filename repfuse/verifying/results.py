"""What was found about two networks, as plain data. No torch here.

The errors are those of ``repfuse.verifying.differences``: of the fused network against the original, relative to the
whole output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from repfuse.jsonready import json_ready
from repfuse.verifying.differences import Comparison, Level, OutputError, TrialComparison

__all__ = [
    "Comparison",
    "Drift",
    "FirstDifference",
    "Level",
    "OutputDrift",
    "OutputError",
    "OutputVerdict",
    "RealData",
    "TrialComparison",
    "Verdict",
    "Verification",
    "Verified",
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
    """

    path: str
    after: str
    trial: str
    error: Level
    allowed: Level


@dataclass(frozen=True)
class RealData:
    """What both networks say of real inputs, in their own dtype. ``None`` where it does not apply.

    ``samples`` in all, of which the first ``compared`` also took part in the float64 comparison.
    ``top1_agreement`` and the accuracies are fractions of the samples.
    """

    samples: int
    compared: int
    top1_agreement: float | None
    accuracy_original: float | None
    accuracy_fused: float | None


@dataclass(frozen=True)
class Verification:
    """The verdict on two networks, in one sentence (``reason``) and in numbers.

    ``dtypes`` are those in which most numbers of the original and of the fused network are stored; ``trials``
    all that was compared in float64, with the weights as they are stored; ``outputs`` one row per output.
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

    @property
    def exit_code(self) -> int:
        """0 same, 1 different, 2 could not tell."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return dict(json_ready(self) | {"drift": self.drift.to_dict() if self.drift else None})
