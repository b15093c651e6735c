"""The parts of a check by themselves: two networks in float64, and each site of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from repfuse.checking.comparison import answers_in_float64, reference, tabulate
from repfuse.checking.inputs import Trial
from repfuse.checking.places import ExactWeights, places
from repfuse.checking.proof import prove_site
from repfuse.checking.results import Comparison, SiteProof
from repfuse.plans import Plan


def compare(original: nn.Module, fused: nn.Module, trials: Sequence[Trial], tolerance: float = 1e-12) -> Comparison:
    """Both networks in float64 on ``trials``, every output held against ``tolerance``."""
    expected = reference(original, trials)
    found = tabulate(trials, expected, answers_in_float64(fused, trials, expected))
    return replace(found, tolerance=tolerance)


def prove_sites(original: nn.Module, fused: nn.Module, plan: Plan) -> Iterator[SiteProof]:
    """Each site of ``fused`` against the nodes of the original's graph that it replaces, in the order they run."""
    found = list(places(original, plan))
    exact = ExactWeights(fused, found)
    return (prove_site(place, fused, exact) for place in found)
