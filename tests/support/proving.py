"""The parts of a check by themselves: two networks in float64, and each site of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from repfuse.checking.comparison import reference, tabulate
from repfuse.checking.inputs import Trial
from repfuse.checking.proof import prove
from repfuse.checking.results import Comparison, SiteProof
from repfuse.checking.runs import run_float64
from repfuse.plans import Plan


def compare(original: nn.Module, fused: nn.Module, trials: Sequence[Trial], tolerance: float = 1e-12) -> Comparison:
    """Both networks in float64 on ``trials``, every output held against ``tolerance``."""
    found = tabulate(trials, reference(original, trials), run_float64(fused, trials))
    return replace(found, tolerance=tolerance)


def prove_sites(original: nn.Module, fused: nn.Module, plan: Plan) -> Iterator[SiteProof]:
    """Each site of ``fused`` against the nodes of the original's graph that it replaces, in the order they run."""
    yield from prove(original, plan, fused, (), ()).sites
