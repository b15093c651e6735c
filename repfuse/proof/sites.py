"""Each site against the part of the graph that it replaces: its algebra, its stored weights and its drift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from repfuse.networks import main_dtype
from repfuse.plans import Plan
from repfuse.proof.exact import ExactWeights
from repfuse.proof.places import Place, places
from repfuse.proof.results import SiteProof
from repfuse.proof.site_drift import site_drift
from repfuse.proof.site_trials import at_the_example, site_trials
from repfuse.proof.weights import compared_weights
from repfuse.verifying import Trial
from repfuse.verifying.comparison import answers_in_float64, reference, tabulate
from repfuse.verifying.copies import Outcome, run_float64
from repfuse.verifying.inputs import rounded_through

TOLERANCE = 1e-12
"""Relative error that separates wrong algebra (1e-3) from float64 rounding (1e-15)."""


def prove_sites(original: nn.Module, fused: nn.Module, plan: Plan) -> Iterator[SiteProof]:
    """Compare each site of ``fused`` with the nodes of the original's graph that it replaces.

    In float64 with the weights before they were rounded, which is the proof; each stored weight with that; and in the
    stored dtype, which is the drift. Yields a proof per sum, named after its first convolution; those of a part in the
    order in which they run.
    """
    found = list(places(original, plan))
    exact = ExactWeights(fused, found)
    return (prove_site(place, fused, exact) for place in found)


def prove_site(place: Place, fused: nn.Module, exact: ExactWeights) -> SiteProof:
    """Compare one site of ``fused`` with what it replaces."""
    after = place.after(fused)
    trials, expected = _runs(place, after)
    answers = answers_in_float64(after, trials, expected, exact.change(after))
    comparison = tabulate(trials, expected, answers, TOLERANCE)
    weights = compared_weights(exact.at(place), fused)
    drift = site_drift(place, fused, trials, expected) if comparison.passed else None
    return SiteProof(place.path, comparison, weights, drift)


def _runs(place: Place, after: nn.Module) -> tuple[Sequence[Trial], list[Outcome]]:
    """Return trials that the original's operations take, and what they give; at the example's size if need be.

    Reflection needs more than the pixels it pads, an average pool over a volume more than its kernel. The inputs are
    such that the stored dtype holds them, so that the drift is the networks' own.
    """
    before, dtype = place.before(), main_dtype(after)
    trials = [rounded_through(trial, dtype) for trial in site_trials(place)]
    expected = run_float64(before, trials)
    if not all(outcome.error for outcome in expected):
        return trials, expected
    trials = [rounded_through(at_the_example(place), dtype)]
    return trials, reference(before, trials)
