"""The whole network, and the weights that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from repfuse.checking.comparison import answers_in_float64, tabulate
from repfuse.checking.inputs import Trial
from repfuse.checking.measure import informative
from repfuse.checking.places import ExactWeights, places
from repfuse.checking.proof_results import Proof
from repfuse.checking.results import Comparison, TrialComparison
from repfuse.checking.rounding import allowed, on, summation
from repfuse.checking.runs import Change, Outcome
from repfuse.checking.sites import TOLERANCE, prove_site, same
from repfuse.memory import give_back
from repfuse.networks import stored_tensors
from repfuse.plans import Plan
from repfuse.recording.stock import is_stock
from repfuse.rewriting import rewrite

# What two networks hold beside their fused weights: modules with their settings, and the other tensors.


def differing(wanted: nn.Module, fused: nn.Module, exact: ExactWeights) -> Iterator[str]:
    """Yield the names of modules and tensors that are not the same in both, the fused weights apart.

    Of those the dtypes and shapes have to agree.
    """
    known, built = _settings(wanted), _settings(fused)
    yield from (name for name in known.keys() | built.keys() if known.get(name) != built.get(name))
    right, stored = dict(stored_tensors(wanted)), dict(stored_tensors(fused))
    yield from right.keys() ^ stored.keys()
    for name in right.keys() & stored.keys():
        copied = stored[name] not in exact
        if not _alike(right[name], stored[name]) or (copied and not same(right[name], stored[name])):
            yield name


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape


def _settings(network: nn.Module) -> dict[str, str]:
    """Return what each module computes, its tensors apart: class and settings, or the steps of a graph."""
    return {name: f"{type(module).__qualname__} {_body(module)}" for name, module in network.named_modules()}


def _body(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):
        return _steps(module.graph)
    return module.extra_repr() if is_stock(module) else ""


def _steps(graph: fx.Graph) -> str:
    """Return the graph with its nodes by number: their names are others when it is read back from a file."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    lines = (
        f"{node.op} {getattr(node.target, '__name__', node.target)} "
        f"{map_arg(node.args, number.__getitem__)} {map_arg(node.kwargs, number.__getitem__)}"
        for node in graph.nodes
    )
    return "\n".join(lines)


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
    orders of magnitude; by how much is measured there, as ``repfuse.checking.rounding`` says.
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
