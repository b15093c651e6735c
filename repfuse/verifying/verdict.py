"""From evidence to a verdict: ``same``, ``different`` or ``could-not-tell``, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator

from repfuse.verifying.evidence import Evidence
from repfuse.verifying.inputs import Effort
from repfuse.verifying.results import Level, Proven, RealData, Verdict
from repfuse.verifying.yardsticks import Key

BLIND = 0.5  # where rounding explains an error of half the output, agreement within it says nothing
Ruling = tuple[Verdict, str]


def decide(evidence: Evidence) -> Ruling:
    """Return the verdict and why."""
    if wrong := evidence.mismatched:
        return "different", f"On {wrong.label}, {wrong.mismatch}."
    if not evidence.informative:
        return "could-not-tell", "The outputs are empty, 0 or not finite on every input that was tried."
    if evidence.excess(evidence.worst) > 1:
        return "different", f"In float64, {_numbers(evidence)}."
    if blind := _blind(evidence):
        return "could-not-tell", f"The networks amplify rounding too much: {_numbers(evidence, blind)}."
    return _decide_drift(evidence)


def with_proof(ruling: Ruling, proof: Proven, evidence: Evidence) -> Ruling:
    """Return the verdict where the plan is known that made one network from the other, and was proven or not.

    What is proven in float64, weight by weight, differs by the rounding of these weights alone, however large the
    effect on the outputs is. The drift stays: it is the networks' own arithmetic. Where the outputs say nothing,
    nothing is known of how the sites are put together.
    """
    if not proof.passed:
        return "different", proof.reason
    drift = evidence.drift
    if (
        ruling[0] == "same"
        or not evidence.informative
        or evidence.mismatched
        or (drift and drift.measured and not drift.passed)
    ):
        return ruling
    return "same", f"{proof.reason} Each stored weight is its rounding."


def notes(evidence: Evidence, dtypes: tuple[str, str], real: RealData | None, effort: Effort) -> Iterator[str]:
    """Yield what the reader must know beside the verdict."""
    if effort == Effort.QUICK:
        yield "Quick: few and small inputs. Leave --quick out before you rely on it."
    if evidence.informative and evidence.vacuous:
        yield f"Nothing can be said of {', '.join(evidence.vacuous)}: empty, 0 or not finite on every input."
    if dtypes[0] != dtypes[1]:
        yield f"The original is stored in {dtypes[0]}, the fused network in {dtypes[1]}."
    if evidence.drift and not evidence.drift.measured:
        yield f"Only compared in float64: {evidence.drift.problem}."
    shared = sum(output.non_finite for row in evidence.table for output in row.outputs)
    if shared:
        yield f"{shared} output elements are infinite or not a number, in the same places in both networks."
    if real and real.compared < real.samples:
        yield f"The errors are those of the first {real.compared} of {real.samples} samples of the data."


def _decide_drift(evidence: Evidence) -> Ruling:
    drift = evidence.drift
    if drift is None or not drift.measured or drift.passed:
        return "same", f"In float64, {_numbers(evidence)}."
    worst = drift.worst
    if worst is None:
        return "different", f"As stored, on {drift.problem}."
    return "different", (
        f"In {worst.dtype}, on {worst.trial}, {worst.name} is off by {_text(worst.fused)}, the original by "
        f"{_text(worst.own)}; rounding explains {_text(worst.allowed)}."
    )


def _blind(evidence: Evidence) -> Key | None:
    """Return where an output differs most of which no trial says anything; None where some trial tells of each."""
    telling = {name for (_, name), limit in evidence.limits.items() if limit.rms < BLIND}
    blind = [key for key in evidence.errors if key[1] not in telling]
    return max(blind, key=lambda key: evidence.errors[key].rms, default=None)


def _numbers(evidence: Evidence, key: Key | None = None) -> str:
    """Say how far off the output at ``key`` is, or the worst one."""
    position, name = key = key or evidence.worst
    error, limit = _text(evidence.errors[key]), _text(evidence.limits[key])
    return f"on {evidence.trials[position].label}, {name} differs by {error}; rounding explains {limit}"


def _text(level: Level) -> str:
    return f"{level.rms:.1e} (at most {level.max:.1e})"
