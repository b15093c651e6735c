"""Each site against the part of the graph that it replaces."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from repfuse.plans import Plan
from repfuse.proof.places import Place, places
from repfuse.proof.results import SiteProof
from repfuse.proof.site_trials import at_the_example, site_trials
from repfuse.verifying import compare
from repfuse.verifying.comparison import answers_in_float64, outcomes_in_float64, tabulate
from repfuse.verifying.results import Comparison

TOLERANCE = 1e-12
"""Relative error that separates wrong algebra (1e-3) from float64 rounding (1e-15)."""


def prove_sites(original: nn.Module, fused: nn.Module, plan: Plan) -> Iterator[SiteProof]:
    """Compare, in float64, each site of ``fused`` with the nodes of the original's graph that it replaces.

    Both modules hold float64 weights. Yields a proof per sum, named after its first convolution; those of a part in
    the order in which they run.
    """
    for place in places(original, plan):
        yield SiteProof(place.path, _compared(place, fused))


def _compared(place: Place, fused: nn.Module) -> Comparison:
    """Compare on the trials that the original's operations take; at the example's size where they take none.

    Reflection needs more than the pixels it pads, an average pool over a volume more than its kernel.
    """
    before, after, trials = place.before(), place.after(fused), list(site_trials(place))
    expected = outcomes_in_float64(before, trials)
    if all(outcome.error for outcome in expected):
        return compare(before, after, [at_the_example(place)], TOLERANCE)
    return tabulate(trials, expected, answers_in_float64(after, trials, expected), TOLERANCE)
