"""Whether two networks compute the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.networks import main_dtype
from repfuse.preconditions import check_runnable
from repfuse.progress import Progress
from repfuse.verifying.agreement import Data, agreement, data_trial
from repfuse.verifying.copies import as_stored, copy_with, run, run_float64
from repfuse.verifying.evidence import Evidence, gather
from repfuse.verifying.inputs import Shape, Trial, input_variants, rounded_through, shaped
from repfuse.verifying.locate import first_difference
from repfuse.verifying.measure import level
from repfuse.verifying.results import FirstDifference, Verdict, Verification
from repfuse.verifying.verdict import decide, notes


def verify(
    original: nn.Module,
    fused: nn.Module,
    example_inputs: Sequence[Any],
    *,
    shapes: Sequence[Shape] | None = None,
    seeds: Sequence[int] = (0, 1),
    data: Data | None = None,
    labels: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Say whether ``fused`` computes what ``original`` does, up to the rounding of its weights.

    Both run in eval mode, without gradients, on copies: first in float64 with the weights as they are stored,
    where only the rounding of the weights may show (see ``repfuse.verifying.rounding``), then in their own
    dtype, where their operations round too (see ``repfuse.verifying.drift``). The inputs are those of
    ``input_variants``, or random ones of the ``shapes`` given for the first input, a set per seed; and
    ``data``, real inputs, with one integer class per sample in ``labels``. ``progress`` is called with a
    stage and the fraction done.

    Raises RepfuseError where the original cannot run the example, the data or labels do not fit, or a network
    cannot be copied.
    """
    for network in (original, fused):
        check_runnable(network)
    report = progress or (lambda _stage, _fraction: None)
    trials = _trials(tuple(example_inputs), shapes, seeds, data)
    trials = [rounded_through(trial, main_dtype(fused)) for trial in trials]
    dtypes = _name(main_dtype(original)), _name(main_dtype(fused))
    try:
        evidence = gather(original, fused, trials, report)
    except RepfuseError as error:
        if not _runs_as_stored(original, trials[0]):
            raise
        return Verification("could-not-tell", f"{error.what} {error.why}", dtypes, (), (), None)
    real = agreement(original, fused, data, labels) if data is not None else None
    verdict, reason = decide(evidence)
    place = None
    if verdict == "different":
        report("where they first differ", 0.9)
        verdict, reason = _confirm(original, fused, evidence, trials[0], reason)
        place = _locate(original, fused, evidence) if verdict == "different" else None
    report("done", 1.0)
    said = tuple(notes(evidence, dtypes, real))
    return Verification(verdict, reason, dtypes, evidence.rows(), evidence.table, evidence.drift, place, real, said)


def _trials(
    example: tuple[Any, ...], shapes: Sequence[Shape] | None, seeds: Sequence[int], data: Data | None
) -> list[Trial]:
    chosen = input_variants(example, seeds=seeds) if shapes is None else shaped(example, shapes, seeds)
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
    return not run(copy_with(network, as_stored), [trial], {})[0].error


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.") if dtype else "no floating dtype"
