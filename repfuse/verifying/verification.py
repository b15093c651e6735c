"""Whether two networks compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.memory import give_back
from repfuse.networks import main_dtype
from repfuse.preconditions import check_runnable
from repfuse.progress import Progress
from repfuse.verifying.agreement import agreement, data_trial
from repfuse.verifying.copies import Outcome, run, run_float64
from repfuse.verifying.evidence import MEASURED, Evidence, gather
from repfuse.verifying.inputs import Effort, Shape, Trial, input_variants, known_effort, rounded_through, shaped
from repfuse.verifying.locate import first_difference
from repfuse.verifying.measure import level
from repfuse.verifying.results import FirstDifference, Proven, Verdict, Verification
from repfuse.verifying.samples import Data
from repfuse.verifying.tolerances import checked, ruling, tolerances
from repfuse.verifying.verdict import decide, notes, with_proof

# Parts of the whole that are done after what is gathered, the real data, and the sites.
DATA, SITES = 0.85, 0.95
SEEDS = (0, 1)  # of inputs of given shapes

Prover = Callable[[Sequence[Trial], Sequence[Outcome], Callable[[float], None]], Proven]
"""Proves a rewrite on inputs, from the original's outcomes in float64 on them; it tells the fraction that is done."""


def verify(
    original: nn.Module,
    fused: nn.Module,
    example_inputs: Sequence[Any],
    *,
    shapes: Sequence[Shape] | None = None,
    seeds: Sequence[int] | None = None,
    effort: Effort | str = Effort.DEFAULT,
    rtol: float | None = None,
    atol: float | None = None,
    data: Data | None = None,
    labels: torch.Tensor | None = None,
    prove: Prover | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Say whether ``fused`` computes what ``original`` does, up to the rounding of its weights.

    Both run in eval mode, without gradients, on copies: first in float64 with the weights as they are stored,
    where only the rounding of the weights may show (see ``repfuse.verifying.rounding``), then in their own
    dtype, where their operations round too (see ``repfuse.verifying.drift``). The inputs are those of
    ``input_variants``, as many as the ``effort`` says, or random ones of the ``shapes`` given for the first input, a
    set per seed; and ``data``, real inputs (a batch, or several that can be walked more than once), with one integer
    class per sample in ``labels``. ``rtol`` and ``atol`` overrule what rounding explains (see
    ``repfuse.verifying.tolerances``). ``prove`` proves the rewrite that made ``fused``, where that is known.
    ``progress`` is called with a stage and the fraction done.

    Raises RepfuseError where the original cannot run the example, the data or labels do not fit, a tolerance is no
    sound number, or a network cannot be copied.
    """
    given, effort = tolerances(rtol, atol), known_effort(effort)
    for network in (original, fused):
        check_runnable(network)
    report = progress or (lambda _stage, _fraction: None)
    trials = _trials(tuple(example_inputs), shapes, seeds, effort, data)
    trials = [rounded_through(trial, main_dtype(fused)) for trial in trials]
    dtypes = _name(main_dtype(original)), _name(main_dtype(fused))
    try:
        evidence = gather(original, fused, trials, report)
    except RepfuseError as error:
        if not _runs_as_stored(original, trials[0]):
            raise
        return Verification("could-not-tell", f"{error.what} {error.why}", dtypes, (), (), None, effort=str(effort))
    real = agreement(original, fused, data, labels, _part_of(report, MEASURED, DATA)) if data is not None else None
    verdict, reason = decide(evidence)
    proof = None
    if prove:
        tried, expected = [trial for trial, _ in evidence.tried], [outcome for _, outcome in evidence.tried]
        give_back(original)
        part = _part_of(report, DATA, SITES)
        proof = prove(tried, expected, lambda done: part("the sites", done))
        verdict, reason = with_proof((verdict, reason), proof, evidence)
    check = None
    if given and evidence.informative and not evidence.mismatched:
        check = checked(given, (original, fused), evidence, (verdict, reason))
        verdict, reason = ruling(check)
    place = None
    if verdict == "different":
        report("where they first differ", SITES)
        place = proof.place if proof else None
        if place is None:
            verdict, reason = _confirm(original, fused, evidence, trials[0], reason)
            place = _locate(original, fused, evidence) if verdict == "different" else None
    report("done", 1.0)
    said = tuple(notes(evidence, dtypes, real, effort))
    return Verification(
        verdict,
        reason,
        dtypes,
        evidence.rows(),
        evidence.table,
        evidence.drift,
        place,
        real,
        said,
        check,
        str(effort),
        proof,
    )


def _trials(
    example: tuple[Any, ...],
    shapes: Sequence[Shape] | None,
    seeds: Sequence[int] | None,
    effort: Effort,
    data: Data | None,
) -> list[Trial]:
    if shapes is None:
        chosen = input_variants(example, seeds=seeds, effort=effort)
    else:
        chosen = shaped(example, shapes, seeds or SEEDS)
    return [*chosen, *([data_trial(data)] if data is not None else [])]


def _confirm(
    original: nn.Module, fused: nn.Module, evidence: Evidence, first: Trial, reason: str
) -> tuple[Verdict, str]:
    """Look for another cause of a difference than the fused network's algebra."""
    row = evidence.table[0]
    if row.mismatch and run_float64(fused, [first])[0].error and _runs_as_stored(fused, first):
        return "could-not-tell", f"In float64, on {row.label}, {row.mismatch}; as it is stored, it does."
    again = run_float64(original, evidence.trials)
    for (position, name), limit in evidence.limits.items():
        before, after = evidence.outcomes[position].outputs[name], again[position].outputs.get(name)
        if after is None or after.shape != before.shape or level(before, after).exceeds(limit):
            label = evidence.trials[position].label
            return "could-not-tell", f"The original does not repeat itself: on {label}, {name} comes out anew."
    return "different", reason


def _locate(original: nn.Module, fused: nn.Module, evidence: Evidence) -> FirstDifference | None:
    """Look at the smallest of the trials that differ."""
    wrong = {key[0] for key in evidence.errors if evidence.excess(key) > 1}
    trials = sorted((evidence.trials[position] for position in wrong), key=_size)
    return first_difference(original, fused, trials[0]) if trials else None


def _size(trial: Trial) -> int:
    return sum(math.prod(shape) for shape in trial.shapes)


def _runs_as_stored(network: nn.Module, trial: Trial) -> bool:
    return not run(network, [trial], {})[0].error


def _part_of(report: Progress, start: float, end: float) -> Progress:
    return lambda stage, fraction: report(stage, start + (end - start) * fraction)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.") if dtype else "no floating dtype"
