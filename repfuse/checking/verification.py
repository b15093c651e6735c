"""Whether two networks compute the same: the verdict, and the tolerances that a user may give for it.

The rule of these is that of torch.testing.assert_close: two outputs agree where |a - b| <= atol + rtol * |a| for each
element, with a the original's. What is not finite agrees where it is the same in both. It has to hold twice: in
float64, and for what both networks give in the dtypes they are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from repfuse.checking.agreement import Data, agreement, data_trial
from repfuse.checking.comparison import level
from repfuse.checking.drift import MEASURED, Evidence, gather
from repfuse.checking.few_bits import check_bits, few_bits
from repfuse.checking.inputs import Effort, Trial, input_variants, known_effort, rounded_through
from repfuse.checking.locate import first_difference
from repfuse.checking.proof import prove
from repfuse.checking.results import Proof, RealData, ToleranceCheck, Verdict, Verification, Worst, without_float64
from repfuse.checking.runs import Key, Outputs, by_key, run, run_float64, takes
from repfuse.errors import RepfuseError
from repfuse.networks import as_inputs, between, check_runnable, main_dtype, why_refused
from repfuse.plans import Plan
from repfuse.wording import Progress, dtype_name, small

Ruling = tuple[Verdict, str]


@dataclass(frozen=True)
class Tolerances:
    """How far an element may be off: |a - b| <= atol + rtol * |a|."""

    rtol: float
    atol: float

    def excess(self, a: torch.Tensor, b: torch.Tensor | None) -> float:
        """Return the largest |a - b| in units of what is allowed; infinite where b is missing or of another shape."""
        if b is None or a.shape != b.shape:
            return math.inf
        a, b = a.to(torch.float64), b.to(torch.float64)
        same = (a == b) | (a.isnan() & b.isnan())
        times = (a - b).abs() / (self.atol + self.rtol * a.abs())
        times = times.nan_to_num(math.inf, math.inf).masked_fill(same, 0)  # inf / inf: only one of both is infinite
        return float(times.max()) if times.numel() else 0.0


def tolerances(rtol: float | None, atol: float | None) -> Tolerances | None:
    """Return the tolerances, one that is not given being 0; None where neither is given.

    Raises RepfuseError for a number that is negative, infinite or no number.
    """
    if rtol is None and atol is None:
        return None
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise RepfuseError(f"{name} is {value}.", "", "A tolerance is a finite number and not negative, as 1e-3.")
    return Tolerances(rtol or 0.0, atol or 0.0)


def by_tolerances(
    given: Tolerances, networks: tuple[nn.Module, nn.Module], evidence: Evidence, arithmetic: Ruling
) -> tuple[ToleranceCheck, Ruling]:
    """Hold what both networks give in float64, and as they are stored, against the tolerances, which alone decide.

    As stored, outputs are left out that the original does not have there (its dtype does not run on this device, or
    overflows). ``arithmetic`` is the verdict without tolerances, and its reason.
    """
    (original, fused), trials, exact = networks, evidence.trials, by_key(evidence.outcomes)
    before = by_key(run(original, trials, {}))
    after = by_key(run(fused, trials, between(original, fused)))
    alike = {key: x for key, x in before.items() if key in exact and x.shape == exact[key].shape}
    sound = {key: x for key, x in alike.items() if torch.equal(torch.isfinite(exact[key]), torch.isfinite(x))}

    def worst(wanted: Outputs, found: Outputs) -> Worst | None:
        keys = wanted.items()
        off = (Worst(trials[at].label, name, given.excess(x, found.get((at, name)))) for (at, name), x in keys)
        return max(off, key=lambda each: each.excess, default=None)

    both = worst(exact, by_key(evidence.answers)), worst(sound, after)
    check = ToleranceCheck(given.rtol, given.atol, *both, *arithmetic)
    measured = [
        f"{each.excess:.3g} times what they allow {where} (on {each.trial}, {each.name})"
        for where, each in zip(("in float64", "as stored"), both, strict=True)
        if each is not None
    ]
    told = f"The tolerances given decide (rtol {check.rtol:g}, atol {check.atol:g}): at most {', '.join(measured)}."
    verdict: Verdict = "same" if check.passed else "different"
    return check, (verdict, f"{told} Arithmetic alone says {check.arithmetic}: {check.reason}")


# From evidence to a verdict: ``same``, ``different`` or ``could-not-tell``, in one sentence.


BLIND = 0.5  # where rounding explains an error of half the output, agreement within it says nothing


def decide(evidence: Evidence) -> Ruling:
    """Return the verdict and why."""
    if wrong := evidence.mismatched:
        return "different", f"On {wrong.label}, {wrong.mismatch}."
    if not evidence.informative:
        return "could-not-tell", "The outputs are empty, 0 or not finite on every input that was tried."
    if evidence.excess(evidence.worst) > 1:
        if evidence.narrow and evidence.drift and evidence.drift.measured:  # what rounds there is in the drift alone
            return _decide_drift(evidence)
        return "different", f"In float64, {_numbers(evidence)}."
    if blind := _blind(evidence):
        return "could-not-tell", f"The networks amplify rounding too much: {_numbers(evidence, blind)}."
    return _decide_drift(evidence)


def with_proof(ruling: Ruling, proof: Proof, evidence: Evidence) -> Ruling:
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
    if evidence.narrow:
        yield f"Not all is compared in float64: {without_float64(evidence.narrow)}."
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
    error, limit = worst.fused.against(worst.allowed)
    own = small(worst.numbers[1])
    return "different", (
        f"In {worst.dtype}, on {worst.trial}, {worst.name} is off by {error}, the original by {own}; rounding explains "
        f"{limit}."
    )


def _blind(evidence: Evidence) -> Key | None:
    """Return where an output differs most of which no trial says anything; None where some trial tells of each."""
    telling = {name for (_, name), limit in evidence.limits.items() if limit.rms < BLIND}
    blind = [key for key in evidence.outputs if key[1] not in telling]
    return max(blind, key=lambda key: evidence.outputs[key].relative.rms, default=None)


def _numbers(evidence: Evidence, key: Key | None = None) -> str:
    """Say how far off the output at ``key`` is, or the worst one."""
    position, name = key = key or evidence.worst
    error, limit = evidence.outputs[key].relative.against(evidence.limits[key])
    return f"on {evidence.trials[position].label}, {name} differs by {error}; rounding explains {limit}"


# Parts of the whole that are done after what is gathered, the real data, and the sites.
DATA, SITES = 0.85, 0.95


def verify(
    original: nn.Module,
    fused: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor,
    *,
    plan: Plan | None = None,
    further_examples: Sequence[Sequence[Any]] = (),
    seeds: Sequence[int] | None = None,
    effort: Effort | str = Effort.DEFAULT,
    rtol: float | None = None,
    atol: float | None = None,
    data: Data | None = None,
    labels: torch.Tensor | None = None,
    bits: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Say whether ``fused`` computes what ``original`` does, up to the rounding of its weights.

    Both run in eval mode, without gradients, on copies: first in float64 with the weights as they are stored,
    where only the rounding of the weights may show (see ``repfuse.checking.rounding``), then in their own
    dtype, where their operations round too (see ``repfuse.checking.drift``). The inputs are those of
    ``input_variants``, as many as the ``effort`` says, around ``example_inputs`` and each of the ``further_examples``;
    and ``data``, real inputs (a batch, or several that can be walked more than once), with one integer
    class per sample in ``labels``. ``rtol`` and ``atol`` overrule what rounding explains. With ``bits``, both also run
    with their weights rounded to so many, see ``repfuse.checking.few_bits``. ``progress`` is called with a stage and
    the fraction done.

    With the ``plan`` that made ``fused``, each site is proven by itself in float64 and each stored weight is held
    against the one computed again from the original: far smaller mistakes show than in the outputs.

    Raises RepfuseError where the original cannot run an example, the data or labels do not fit, a tolerance is no
    sound number, a network cannot be copied, or the plan is of other networks.
    """
    given, effort, example_inputs = tolerances(rtol, atol), known_effort(effort), as_inputs(example_inputs)
    check_bits(bits)
    for network in (original, fused):
        check_runnable(network)
    report = progress or (lambda _stage, _fraction: None)
    trials = [*input_variants(example_inputs, seeds=seeds, effort=effort)]
    for example in further_examples:
        trials += _around(original, input_variants(example, seeds=seeds, effort=effort))
    trials += [data_trial(data)] if data is not None else []
    trials = [rounded_through(trial, main_dtype(fused)) for trial in trials]
    stored = (main_dtype(network) for network in (original, fused))
    one, other = (dtype_name(dtype) if dtype else "no floating dtype" for dtype in stored)
    dtypes = one, other
    try:
        evidence = gather(original, fused, trials, report)
    except RepfuseError as error:
        if not takes(original, trials[0].inputs):
            raise
        return Verification("could-not-tell", f"{error.what} {error.why}", dtypes, (), (), None, effort=str(effort))
    real = agreement(original, fused, data, labels, _part_of(report, MEASURED, DATA)) if data is not None else None
    verdict, reason = decide(evidence)
    proof = None
    if plan is not None and plan.sites:
        tried, expected = [trial for trial, _ in evidence.tried], [outcome for _, outcome in evidence.tried]
        part = _part_of(report, DATA, SITES)
        proof = prove(
            original, plan, fused, tried, expected, effort=effort, progress=lambda done: part("the sites", done)
        )
        verdict, reason = with_proof((verdict, reason), proof, evidence)
    check = None
    if given and evidence.informative and not evidence.mismatched:
        check, (verdict, reason) = by_tolerances(given, (original, fused), evidence, (verdict, reason))
    place = None
    if verdict == "different":
        report("where they first differ", SITES)
        place = proof.place if proof else None
        if place is None:
            verdict, reason = _confirm(original, fused, evidence, trials[0], reason)
            wrong = {key[0] for key in evidence.outputs if evidence.excess(key) > 1}
            smallest = min((evidence.trials[at] for at in wrong), key=lambda trial: trial.work, default=None)
            place = first_difference(original, fused, smallest) if smallest and verdict == "different" else None
    rounded = None
    if bits is not None:
        report(f"weights of {bits} bits", SITES)
        rounded = few_bits(original, fused, trials[-1 if data is not None else 0], bits, data, labels)
    report("done", 1.0)
    said = tuple(notes(evidence, dtypes, real, effort))
    measured = evidence.rows(), evidence.table, evidence.drift
    return Verification(
        verdict, reason, dtypes, *measured, place, real, said, check, str(effort), proof, few_bits=rounded
    )


def _around(original: nn.Module, variants: Sequence[Trial]) -> list[Trial]:
    """Return the trials around another example, which they name. Raises RepfuseError where the original refuses it."""
    example = variants[0]
    shapes = ", ".join("x".join(map(str, shape)) for shape in example.shapes)
    if error := run(original, [example], {})[0].error:
        refused = why_refused(original, example.inputs, error)
        raise RepfuseError(f"The original does not take the input {shapes}.", *refused)
    return [replace(trial, label=f"{trial.label} around {shapes}") for trial in variants]


def _confirm(
    original: nn.Module, fused: nn.Module, evidence: Evidence, first: Trial, reason: str
) -> tuple[Verdict, str]:
    """Look for another cause of a difference than the fused network's algebra."""
    row = evidence.table[0]
    if row.mismatch and run_float64(fused, [first])[0].error and takes(fused, first.inputs):
        return "could-not-tell", f"In float64, on {row.label}, {row.mismatch}; as it is stored, it does."
    outputs, again = by_key(evidence.outcomes), by_key(run_float64(original, evidence.trials))
    for (position, name), limit in evidence.limits.items():
        before, after = outputs[position, name], again.get((position, name))
        if after is None or after.shape != before.shape or level(before, after).exceeds(limit):
            label = evidence.trials[position].label
            return "could-not-tell", f"The original does not repeat itself: on {label}, {name} comes out anew."
    return "different", reason


def _part_of(report: Progress, start: float, end: float) -> Progress:
    return lambda stage, fraction: report(stage, start + (end - start) * fraction)
