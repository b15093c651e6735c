"""What was found about two networks, as plain data. No torch here.

``original`` is the reference, ``fused`` the network that should compute the same. All errors are of ``fused``
against ``original``. Per output: ``max`` is max|a - b| / max|a|, ``rms`` is ||a - b|| / ||a|| (Euclidean).
Both divide by a property of the whole output, so elements near 0 do no harm; both are 0 where a and b are
equal and infinite where a is 0 everywhere and b is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repfuse.plans import Refusal
from repfuse.wording import Result, apart


def quotient(value: float, allowed: float) -> float:
    """Return value / allowed, which is infinite where nothing is allowed, and 0 for nothing."""
    if value == 0:
        return 0.0
    return value / allowed if allowed else float("inf")


@dataclass(frozen=True)
class Level:
    """A relative difference of one output, in the two norms of this module: ``rms`` and ``max``."""

    rms: float
    max: float

    def exceeds(self, allowed: Level) -> bool:
        """Whether either norm is above ``allowed``."""
        return not (self.rms <= allowed.rms and self.max <= allowed.max)

    def over(self, allowed: Level) -> float:
        """Return the larger of the two quotients self / allowed: above 1, it is not explained. Of no limit, it is 0."""
        pairs = (self.rms, allowed.rms), (self.max, allowed.max)
        return max(0.0 if limit == float("inf") else quotient(value, limit) for value, limit in pairs)

    def norm(self, allowed: Level) -> str:
        """Return which of the two norms decides, as the larger quotient: people are shown that one alone."""
        return "rms" if quotient(self.rms, allowed.rms) > quotient(self.max, allowed.max) else "max"

    def against(self, allowed: Level) -> tuple[str, str]:
        """Return this and what is allowed in the norm that decides, as text from which one sees which is larger."""
        norm = self.norm(allowed)
        return apart(getattr(self, norm), getattr(allowed, norm))


@dataclass(frozen=True)
class OutputError:
    """The difference of one output, over its finite elements.

    ``max_abs`` is max|a - b|, which is also the smallest absolute tolerance that passes; ``smallest_rtol``
    the smallest purely relative one, max(|a - b| / |a|), or None where no finite one passes; ``scale`` max|a|;
    ``worst`` the index of the largest difference, ``values`` a and b there; ``non_finite`` how many elements are
    infinite or not a number, in the same places in both.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    relative: Level
    max_abs: float
    scale: float
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


def without_float64(paths: Sequence[str]) -> str:
    """Say which modules ran in their own dtype: those at ``paths``, or all of the network."""
    who = ", ".join(paths) if all(paths) else "the network"
    return f"{who} ran in the stored dtype, having no float64"


@dataclass(frozen=True)
class Comparison(Result):
    """Both networks in float64 on several trials, against one relative ``tolerance`` on the max norm.

    ``narrow`` are the paths of modules that have no float64, and ran in their own dtype ("" for all of the network).
    """

    ALSO: ClassVar[tuple[str, ...]] = ("passed", "error", "reason")
    trials: tuple[TrialComparison, ...]
    tolerance: float
    narrow: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[TrialComparison, OutputError] | None:
        """The output with the largest relative error, and its trial; None where nothing could be compared."""
        return max(self.by_output, key=lambda pair: pair[1].relative.max, default=None)

    @property
    def by_output(self) -> list[tuple[TrialComparison, OutputError]]:
        """Of each output the largest relative error, with its trial."""
        rows = [(trial, output) for trial in self.trials for output in trial.outputs]
        names = dict.fromkeys(output.name for _, output in rows)
        of_each = ([row for row in rows if row[1].name == name] for name in names)
        return [max(each, key=lambda row: row[1].relative.max) for each in of_each]

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
    def limits(self) -> str:
        """What is not compared in float64, and how far the whole agrees; "" where all of it is."""
        if not self.narrow:
            return ""
        return (
            f"{without_float64(self.narrow)}: the whole network is held to {self.tolerance:.0e}, each site to float64"
        )

    @property
    def reason(self) -> str:
        """One sentence: what decided ``passed``."""
        if self.mismatches:
            return f"{self.mismatches[0].label}: {self.mismatches[0].mismatch}."
        if self.worst is None:
            return "Nothing could be compared."
        trial, output = self.worst
        side = "within" if self.passed else "above"
        error, tolerance = apart(output.relative.max, self.tolerance)
        but = f", but for {', '.join(self.narrow)}," if self.narrow else ""
        where = f"In float64{but}" if all(self.narrow) else "In the stored dtype"
        return (
            f"{where} the largest error is {error} of the output's scale ({trial.label}, {output.name}), {side} "
            f"{tolerance}."
        )


Verdict = Literal["same", "different", "could-not-tell"]
EXIT_CODES: dict[Verdict, int] = {"same": 0, "different": 1, "could-not-tell": 2}


@dataclass(frozen=True)
class OutputDrift:
    """One output of one trial, computed in each network's own dtype, against the original in float64.

    ``own`` is the original's error, ``fused`` the fused network's; ``rounding`` the effect of rounding each changed
    weight once, where it was measured: the original's own error does not explain all there. ``allowed`` is what
    arithmetic explains (see repfuse.checking.drift).
    """

    trial: str
    name: str
    dtype: str
    own: Level
    fused: Level
    rounding: Level | None
    allowed: Level

    @property
    def used(self) -> float:
        """The error in units of what is allowed."""
        return self.fused.over(self.allowed)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The error, the original's own, and what is allowed, in the norm that decides."""
        norm = self.fused.norm(self.allowed)
        error, own, allowed = (getattr(level, norm) for level in (self.fused, self.own, self.allowed))
        return error, own, allowed

    @property
    def passed(self) -> bool:
        """Whether the fused network's error is explained."""
        return not self.fused.exceeds(self.allowed)


@dataclass(frozen=True)
class Drift(Result):
    """The difference in the networks' own dtype. ``problem`` says why it failed or could not be measured, if so.

    ``measured`` is False where the networks cannot run in their own dtype on this device (half precision on a CPU).
    """

    ALSO: ClassVar[tuple[str, ...]] = ("passed", "worst")
    outputs: tuple[OutputDrift, ...]
    measured: bool = True
    problem: str = ""

    @property
    def worst(self) -> OutputDrift | None:
        """The output that comes closest to what is allowed, or furthest above."""
        return max(self.outputs, key=lambda output: output.used, default=None)

    @property
    def by_output(self) -> dict[str, OutputDrift]:
        """Of each output the trial on which it comes closest, or furthest above."""
        names = dict.fromkeys(output.name for output in self.outputs)
        return {
            name: max((output for output in self.outputs if output.name == name), key=lambda output: output.used)
            for name in names
        }

    @property
    def passed(self) -> bool:
        """Whether it was measured, and every output is explained by arithmetic."""
        return self.measured and not self.problem and all(output.passed for output in self.outputs)

    @property
    def reason(self) -> str:
        """One sentence: what is wrong, or what comes closest to that."""
        worst = self.worst
        if self.problem or worst is None:
            return f"{self.problem or 'There is nothing to judge by'}."
        error, limit = worst.fused.against(worst.allowed)
        return f"On {worst.trial}, {worst.name} has a relative error of {error}, where arithmetic explains {limit}."


@dataclass(frozen=True)
class Verified:
    """A written file that was read again and run before it counted: in which ``runtime`` and on which inputs.

    ``shapes`` are those that the file takes, dynamic axes by name; ``refused`` the inputs that the original takes and
    the file does not, as its shapes say. ``error`` is the worst output's rms error relative to the original in float64,
    ``own`` the original's own there, ``allowed`` what arithmetic explains; they are None where the outputs are
    ``identical``: bit by bit those of the network that was written. ``where`` is a fresh process, or this one and why.
    ``tensors`` counts those that were compared bit by bit, ``seconds`` is what all this took.
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
class Flip:
    """A sample, by its file or its number, with the class that each network gives it, and its own where it is known.

    A class of -1 is none: an output that is not a number.
    """

    sample: str
    original: int
    fused: int
    label: int | None = None


@dataclass(frozen=True)
class Flips:
    """The ``samples`` that the networks put in different classes.

    With labels: how many of them the original alone has right, and how many the fused network alone. The margins are
    the original's on these samples, its highest output less its second, relative to the largest magnitude of that
    sample's outputs: the smallest and the largest. A flip at a margin of the size of the drift is no mistake. ``first``
    are some of them, those of the largest margins first.
    """

    samples: int
    right_to_wrong: int | None
    wrong_to_right: int | None
    smallest_margin: float | None
    largest_margin: float | None
    first: tuple[Flip, ...] = ()


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


@dataclass(frozen=True)
class WeightProof:
    """A stored tensor against the one computed in float64 from the original's and rounded once to its dtype.

    ``wrong`` elements are not equal to that; ``spacings`` is the largest difference in units in the last place, from
    the number in float64: at most a half where all are equal.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    wrong: int
    spacings: float

    @property
    def passed(self) -> bool:
        """Whether every element is equal to the rounding of the last bit."""
        return not self.wrong

    @property
    def reason(self) -> str:
        """One sentence: what differs."""
        return (
            f"{self.name}: {self.wrong} of the stored numbers are not those that were computed, rounded once "
            f"({self.spacings:.2g} units in the last place)."
        )


@dataclass(frozen=True)
class SiteDrift:
    """A site in its stored dtype against the original in float64, on the largest of its inputs that runs in it.

    ``own`` is the error of the original's operations, ``fused`` that of the fused convolution; ``bound`` the a-priori
    bound of the arithmetic (see ``repfuse.checking.proof``) as a level. ``of_bound`` is the largest quotient of an
    element's error and its own bound.
    """

    trial: str
    dtype: str
    own: Level
    fused: Level
    bound: Level
    of_bound: float

    @property
    def passed(self) -> bool:
        """Whether every element is within its bound."""
        return self.of_bound <= 1


@dataclass(frozen=True)
class SiteProof(Result):
    """One site against the operations that it replaces, on small inputs of several sizes, as many as ``trials`` says.

    ``comparison`` is the proof: both in float64, with weights that are not rounded yet; of it, JSON holds ``error`` and
    ``tolerance`` alone. ``weights`` compares those with what is stored. ``drift`` is None where the stored dtype is
    float64, or does not run here, and in a quick check. It ``passed`` where all three do, and ``reason`` is one
    sentence: what decided.
    """

    path: str
    passed: bool
    error: float | None
    tolerance: float
    reason: str
    trials: int
    weights: tuple[WeightProof, ...] = ()
    drift: SiteDrift | None = None
    comparison: Comparison = field(default=Comparison((), 0.0), repr=False)

    @staticmethod
    def of(
        path: str, comparison: Comparison, weights: tuple[WeightProof, ...] = (), drift: SiteDrift | None = None
    ) -> SiteProof:
        """Return what follows from the three parts."""
        passed, reason = comparison.passed, f"{path}: {comparison.reason}"
        if passed and (wrong := next((weight for weight in weights if not weight.passed), None)):
            passed, reason = False, wrong.reason
        elif passed and drift and not drift.passed:
            over = f"an element is off by {drift.of_bound:.1e} times what the arithmetic can explain"
            passed, reason = False, f"{path}: in {drift.dtype}, on {drift.trial}, {over}."
        told = comparison.error, comparison.tolerance, reason, len(comparison.compared)
        return SiteProof(path, passed, *told, weights, drift, comparison)

    def departure(self, after: str) -> FirstDifference | None:
        """Return where it departs most and by how much; ``after`` is the path of the site before it."""
        wrong = next((weight for weight in self.weights if not weight.passed), None)
        worst, drift = self.comparison.worst, self.drift
        if not self.comparison.passed and worst:
            at, error, most, unit = worst[0].label, worst[1].relative, self.tolerance, "relative error"
        elif wrong:
            at, error, most = wrong.name, Level(wrong.spacings, wrong.spacings), 0.5
            unit = "difference in units in the last place"
        elif drift:
            at, error, most = drift.trial, Level(drift.of_bound, drift.of_bound), 1.0
            unit = "error in units of its bound"
        else:
            return None
        return FirstDifference(self.path, after, at, error, Level(most, most), unit)


@dataclass(frozen=True)
class Proof(Result):
    """Every site, the whole network, and the names of what beside the sites is not what the plan makes.

    ``informative`` is False where the network's outputs are 0 or not finite on every input: then only the sites tell.
    """

    ALSO: ClassVar[tuple[str, ...]] = ("passed", "error", "reason")
    sites: tuple[SiteProof, ...]
    network: Comparison
    unproven: tuple[str, ...]
    informative: bool = True

    @property
    def passed(self) -> bool:
        """Whether every part holds."""
        return self.network.passed and not self.unproven and all(site.passed for site in self.sites)

    @property
    def first(self) -> SiteProof | None:
        """The first site that fails."""
        return next((site for site in self.sites if not site.passed), None)

    @property
    def place(self) -> FirstDifference | None:
        """Where that is, with the error there: in float64, or as stored where it is the stored weights that fail."""
        if self.first is None:
            return None
        paths = [site.path for site in self.sites]
        before = paths.index(self.first.path)
        return self.first.departure(paths[before - 1] if before else "")

    @property
    def error(self) -> float | None:
        """The largest relative error in float64 of the network and of any site."""
        errors = [self.network.error, *(site.error for site in self.sites)]
        return max((error for error in errors if error is not None), default=None)

    @property
    def reason(self) -> str:
        """One sentence: what decided."""
        if self.first:
            return self.first.reason
        if self.unproven:
            return f"The network is not what the plan makes of the original: {', '.join(self.unproven[:3])}."
        return self.network.reason


@dataclass(frozen=True)
class RoundedWeights:
    """The signal-to-noise of the outputs, in decibels, where the weights of each network are rounded in steps of the
    same size ``per`` tensor or channel; and the accuracies then, where the labels are known.
    """

    per: Literal["tensor", "channel"]
    original: float
    fused: float
    accuracy_original: float | None = None
    accuracy_fused: float | None = None


@dataclass(frozen=True)
class RoundedLayer:
    """The signal-to-noise of the fused network's outputs where the weight at ``path`` alone is rounded, per tensor."""

    path: str
    level: float


@dataclass(frozen=True)
class FewBits:
    """Both networks with weights of so many ``bits``, each against itself; ``weights`` counts those of each.

    ``trial`` is the input, ``layers`` are those of the fused network, that which costs most first.
    """

    bits: int
    trial: str
    weights: tuple[int, int]
    ways: tuple[RoundedWeights, ...]
    layers: tuple[RoundedLayer, ...]


@dataclass(frozen=True)
class Verification(Result):
    """The verdict on two networks, in one sentence (``reason``) and in numbers.

    ``dtypes`` are those in which most numbers of the original and of the fused network are stored; ``trials``
    all that was compared in float64, with the weights as they are stored; ``outputs`` one row per output.
    ``tolerances`` are those that overruled arithmetic, if any; ``effort`` is how much was tried. ``proof`` is there
    where the plan is known that made one network from the other. ``few_bits`` is where it was asked for, and decides
    nothing.
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
    proof: Proof | None = None
    few_bits: FewBits | None = None

    @property
    def exit_code(self) -> int:
        """0 same, 1 different, 2 could not tell."""
        return EXIT_CODES[self.verdict]


@dataclass(frozen=True)
class Rescaled:
    """A tensor that was multiplied, number by number, by ``least`` to ``most``."""

    name: str
    least: float
    most: float


@dataclass(frozen=True)
class SignalGain:
    """The signal-to-noise at the network's outputs where its weights have so many ``bits``, per tensor: decibels."""

    bits: int
    before: float
    after: float


@dataclass(frozen=True)
class Equalization(Result):
    """What was rescaled, by how many free ``scales``, and what that gains on ``inputs``: the data, or noise.

    ``refusals`` are places across which nothing could be, ``notes`` what the user must be told of how it was done.
    ``comparison`` holds the result against the original, in float64 with weights that are not rounded.
    """

    tensors: tuple[Rescaled, ...]
    scales: int
    powers_of_two: bool
    inputs: str
    gains: tuple[SignalGain, ...]
    refusals: tuple[Refusal, ...]
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()
