"""The drift of one site: what rounding did to it in its stored dtype, against what arithmetic allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from repfuse.networks import main_dtype
from repfuse.proof.bounds import bounds
from repfuse.proof.places import Place
from repfuse.proof.results import SiteDrift
from repfuse.verifying import Trial
from repfuse.verifying.copies import Outcome, run
from repfuse.verifying.measure import level
from repfuse.verifying.results import Level


def site_drift(
    place: Place, fused: nn.Module, trials: Sequence[Trial], expected: Sequence[Outcome]
) -> SiteDrift | None:
    """Run a site before and after the rewrite in its stored dtype, against its outcomes in float64, ``expected``.

    Returns the trial that comes closest to its bound. None where that is float64, which is the proof's, or where the
    original's operations do not run in it here, or overflow.
    """
    after = place.after(fused)
    dtype = main_dtype(after)
    if dtype in (None, torch.float64):
        return None
    taken = [position for position, outcome in enumerate(expected) if not outcome.error]
    chosen, exact = [trials[position] for position in taken], [expected[position] for position in taken]
    cast = {torch.float64: dtype}
    outcomes = zip(
        chosen,
        exact,
        run(place.before(), chosen, cast),
        run(after, chosen, cast),
        bounds(place, fused, chosen, dtype),
        strict=True,
    )
    drifts = [_drift(*each) for each in outcomes if not each[2].error and _finite(each[2])]
    return max(drifts, key=lambda drift: drift.of_bound, default=None)


def _drift(trial: Trial, exact: Outcome, own: Outcome, found: Outcome, bound: torch.Tensor | None) -> SiteDrift:
    wanted, original = exact.outputs["out"], own.outputs["out"]
    dtype = str(original.dtype).removeprefix("torch.")
    if found.error or bound is None:
        return SiteDrift(trial.label, dtype, level(wanted, original), WORST, WORST, WORST.max)
    fused = found.outputs["out"]
    error = (fused.double() - wanted).abs()
    over = float((error / bound).nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0
    allowed = level(wanted, wanted + bound)
    return SiteDrift(trial.label, dtype, level(wanted, original), level(wanted, fused), allowed, over)


WORST = Level(float("inf"), float("inf"))


def _finite(outcome: Outcome) -> bool:
    return all(bool(output.isfinite().all()) for output in outcome.outputs.values())
