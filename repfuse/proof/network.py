"""The whole network, and the weights that are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from repfuse.memory import give_back
from repfuse.plans import Plan
from repfuse.proof.exact import ExactWeights
from repfuse.proof.places import places
from repfuse.proof.results import Proof
from repfuse.proof.sites import TOLERANCE, prove_site
from repfuse.proof.structure import differing
from repfuse.rewriting import rewrite
from repfuse.verifying import Trial
from repfuse.verifying.comparison import answers_in_float64, tabulate
from repfuse.verifying.copies import Outcome
from repfuse.verifying.measure import informative
from repfuse.verifying.results import Comparison, TrialComparison
from repfuse.verifying.rounding import allowed, on, summation
from repfuse.verifying.widening import Change


def prove(
    original: nn.Module,
    plan: Plan,
    fused: nn.Module,
    trials: Sequence[Trial],
    expected: Sequence[Outcome],
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> Proof:
    """Prove that ``fused``, made from ``original`` by ``plan``, computes the same.

    ``expected`` are the original's outcomes in float64 on ``trials``. Each site is proven by itself; then the whole
    network, in float64 with weights that are not rounded. What ``fused`` stores beside its sites, and what stock
    modules show of their settings, has to be what the plan, carried out a second time, makes of it; other settings show
    in the runs of the whole network alone. ``progress`` is told the fraction that is done. Raises RepfuseError where a
    network cannot be copied.
    """
    found = list(places(original, plan))
    exact = ExactWeights(fused, found)
    sites = []
    for place in found:
        sites.append(prove_site(place, fused, exact))
        progress(0.5 * len(sites) / len(found))
    unproven = tuple(sorted(differing(rewrite(original, plan, weights=False), fused, exact)))
    give_back(original)
    network = compare(fused, exact, trials, expected, sound=all(site.comparison.passed for site in sites))
    progress(1.0)
    tells = any(informative(output) for outcome in expected for output in outcome.outputs.values())
    return Proof(tuple(sites), network, unproven, tells)


def compare(
    fused: nn.Module, exact: ExactWeights, trials: Sequence[Trial], expected: Sequence[Outcome], *, sound: bool = True
) -> Comparison:
    """Compare what the network computes in float64, its weights not rounded, with what the original does.

    Where each site is ``sound`` by itself, a larger error is accepted as far as the order of summation explains it.
    """
    change = exact.change(fused)
    network = tabulate(trials, expected, answers_in_float64(fused, trials, expected, change), TOLERANCE)
    if not network.passed and not network.mismatches and sound:
        network = replace(network, tolerance=_explained(fused, change, trials, expected, network))
    return network


def _explained(
    network: nn.Module, change: Change, trials: Sequence[Trial], outcomes: Sequence[Outcome], seen: Comparison
) -> float:
    """Return the tolerance that rounding in float64 explains in ``network``, where it explains the errors.

    TOLERANCE holds for layers that hand an error on as large as it is. Some networks amplify it at some inputs, by
    orders of magnitude; by how much is measured there, as ``repfuse.verifying.rounding`` says.
    """
    above = {index: row for index, row in enumerate(seen.trials) if row.outputs and _largest(row) > TOLERANCE}
    chosen = [trials[index] for index in above]
    expected = [outcomes[index] for index in above]
    effect = summation(network, on(chosen), expected, change)
    limits = {key: limit.max for key, limit in allowed([effect]).items()}
    explained = all(
        output.relative.max <= limits[position, output.name]
        for position, row in enumerate(above.values())
        for output in row.outputs
    )
    return max(limits.values()) if explained else TOLERANCE


def _largest(row: TrialComparison) -> float:
    return max(output.relative.max for output in row.outputs)
