"""What two networks hold beside their fused weights: modules with their settings, and the other tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from repfuse.networks import stored_tensors
from repfuse.proof.exact import ExactWeights
from repfuse.proof.weights import same
from repfuse.recording.stock import is_stock


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
