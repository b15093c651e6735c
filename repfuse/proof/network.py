"""The whole network, and the weights that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from repfuse.networks import dense, stored_tensors
from repfuse.plans import Plan
from repfuse.proof.results import Proof
from repfuse.proof.sites import TOLERANCE, prove_sites
from repfuse.rewriting import rewrite
from repfuse.tracing.leaves import is_stock
from repfuse.verifying import Trial
from repfuse.verifying.comparison import answers_in_float64, tabulate
from repfuse.verifying.copies import Outcome, copy_with, in_float64, run_float64
from repfuse.verifying.results import Comparison, TrialComparison
from repfuse.verifying.rounding import allowed, summation


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

    ``expected`` are the original's outcomes in float64 on ``trials``. The plan is carried out a second time, on the
    original in float64: that network is compared, and ``fused`` must hold its tensors, rounded. ``progress`` is told
    the fraction that is done. Raises RepfuseError where a network cannot be copied.
    """
    wide = copy_with(original, in_float64)
    wide_fused = rewrite(wide, plan)
    sites = []
    for site in prove_sites(wide, wide_fused, plan):
        sites.append(site)
        progress(0.5 * len(sites) / len(plan.sites))
    del wide
    found = answers_in_float64(wide_fused, trials, expected)
    network = tabulate(trials, expected, found, TOLERANCE)
    if not network.passed and not network.mismatches and all(site.passed for site in sites):
        network = replace(network, tolerance=_explained(wide_fused, trials, found, network))
    progress(1.0)
    return Proof(tuple(sites), network, tuple(sorted(_differing(wide_fused, fused))))


def _explained(network: nn.Module, trials: Sequence[Trial], outcomes: Sequence[Outcome], seen: Comparison) -> float:
    """Return the tolerance that rounding in float64 explains in ``network``, where it explains the errors.

    TOLERANCE holds for layers that hand an error on as large as it is. Some networks amplify it at some inputs, by
    orders of magnitude; by how much is measured there, as ``repfuse.verifying.rounding`` says.
    """
    above = {index: row for index, row in enumerate(seen.trials) if row.outputs and _largest(row) > TOLERANCE}
    chosen = [trials[index] for index in above]
    expected = [outcomes[index] for index in above]
    effect = summation(network, lambda copy: run_float64(copy, chosen), expected)
    limits = {key: limit.max for key, limit in allowed([effect]).items()}
    explained = all(
        output.relative.max <= limits[position, output.name]
        for position, row in enumerate(above.values())
        for output in row.outputs
    )
    return max(limits.values()) if explained else TOLERANCE


def _largest(row: TrialComparison) -> float:
    return max(output.relative.max for output in row.outputs)


def _differing(wide: nn.Module, narrow: nn.Module) -> Iterator[str]:
    """Yield the names of modules and tensors of ``narrow`` that are not those of ``wide``, rounded."""
    known, built = _settings(wide), _settings(narrow)
    yield from (name for name in known.keys() | built.keys() if known.get(name) != built.get(name))
    exact, stored = dict(stored_tensors(wide)), dict(stored_tensors(narrow))
    for name in exact.keys() | stored.keys():
        if name not in exact or name not in stored or not _same(exact[name].to(stored[name].dtype), stored[name]):
            yield name


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal element by element; what is not a number equals itself."""
    one, other = dense(one), dense(other)
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _settings(network: nn.Module) -> dict[str, str]:
    """Return what each module computes, its tensors apart: class and settings, or the code of a graph."""
    return {name: f"{type(module).__qualname__} {_body(module)}" for name, module in network.named_modules()}


def _body(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):
        return module.code
    return module.extra_repr() if is_stock(module) else ""
