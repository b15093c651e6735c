"""Modules in a row that become one of them: the plainest rewrite, since everything around stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Normalisation
from repfuse.ops import Meaning
from repfuse.ops.meaning import Applied, Rescaled, convolves
from repfuse.placing.edits import Candidate
from repfuse.placing.uses import Uses
from repfuse.tracing.leaves import is_stock
from repfuse.tracing.trace import Traced
from repfuse.tracing.tracer import Call


@dataclass(frozen=True)
class Row:
    """``convolution`` is the module that becomes the fused one; if it ``stays``, that takes new weights alone.

    ``others`` are modules that become no-ops, ``norms`` normalisations that forwards of their own compute.
    """

    convolution: str
    stays: bool
    others: tuple[str, ...]
    norms: tuple[fx.Node, ...]


class Folding:
    """Finds such rows in one traced model."""

    def __init__(self, traced: Traced, meanings: dict[fx.Node, Meaning | None], uses: Uses) -> None:
        self.traced = traced
        self.meanings = meanings
        self.uses = uses

    def row(self, candidate: Candidate, call: Call) -> Row | None:
        """Return the region as a row of modules, if it is one and nothing else uses the modules."""
        region, group = candidate.region, candidate.groups[0]
        layers = [node for node in region.working if isinstance(self.meanings[node], Applied)]
        norms = [node for node in region.working if self._normalises(node)]
        nodes = sorted((*layers, *norms), key=self.traced.order.__getitem__)
        path_of = {node: self._module(node, call) for node in nodes}
        if len(region.groups) > 1 or len(nodes) != len(region.working) or not all(path_of[node] for node in layers):
            return None
        convolution = [node for node in nodes if convolves(self.meanings[node])][-1]
        stays = len(layers) == 1 and self._stays(convolution, group.expression.geometry)
        if not all(self._alone(node, call, keeps=stays and node is convolution) for node in nodes):
            return None
        if not stays and not self._unseen(candidate):
            return None
        others = tuple(path for node, path in path_of.items() if path and node is not convolution)
        norms = [node for node in norms if path_of[node] is None]
        return Row(path_of[convolution] or "", stays, others, tuple(norms))

    def _module(self, node: fx.Node, owner: Call) -> str | None:
        """Return the path of the module that computes ``node`` and nothing else: by its class, if not by being a leaf.

        A stock convolution is traced through where it computes its weight.
        """
        if node.op == "call_module":
            return str(node.target)
        call = self.traced.call_of[node]
        computes = call is not owner and call.output is node and is_stock(self.traced.module.get_submodule(call.path))
        return call.path if computes and isinstance(self.meanings[node], Applied) else None

    def _normalises(self, node: fx.Node) -> bool:
        meaning = self.meanings[node]
        return isinstance(meaning, Rescaled) and isinstance(meaning.by, Normalisation)

    def _stays(self, node: fx.Node, fused: Geometry) -> bool:
        meaning = self.meanings[node]
        assert isinstance(meaning, Applied)
        return node.op == "call_module" and meaning.layer.geometry == fused

    def _alone(self, node: fx.Node, owner: Call, *, keeps: bool) -> bool:
        """Whether the module behind ``node`` runs once in every call of the owner, and nothing else uses it."""
        path = self._module(node, owner)
        if path is None:
            return True
        runs = len(self.traced.calls[owner.path])
        if node.op != "call_module":
            return len(self.traced.calls[path]) == runs and not self.uses.reached[path]
        module = self.traced.module.get_submodule(path)
        return self.uses.runs[module] == runs and not self.uses.reads(module, keeps)

    def _unseen(self, candidate: Candidate) -> bool:
        """Whether nothing looks at a value within the row but at its rank: one of another shape will pass there."""
        region = candidate.region
        readers = (user for node in region.nodes if node is not region.root for user in node.users)
        return all(user in region.nodes or _reads_rank(user) for user in readers)


def _reads_rank(node: fx.Node) -> bool:
    return node.args[1:] == ("ndim",) if node.target is getattr else node.op == "call_method" and node.target == "dim"
