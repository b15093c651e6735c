"""The whole network, and the weights that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from repfuse.checking.inputs.trial import Trial
from repfuse.checking.measure import informative
from repfuse.checking.places import ExactWeights, compare_exact, places
from repfuse.checking.results import Proof
from repfuse.checking.runs import Outcome
from repfuse.checking.sites import prove_site, same
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
    network = compare_exact(fused, exact, trials, expected, sound=all(site.comparison.passed for site in sites))
    progress(1.0)
    tells = any(informative(output) for outcome in expected for output in outcome.outputs.values())
    return Proof(tuple(sites), network, unproven, tells)
