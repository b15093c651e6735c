"""regions -> edits: in which module each fused convolution lives, and in which of three forms it is written there.

1. *fold*: one convolution followed by normalisations: new weights in that convolution, ``Identity`` for the rest.
2. *chain*: a block that becomes modules in a row: ``Sequential`` of stock modules, or the one convolution.
3. *graph*: otherwise a ``GraphModule`` of that block alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from torch import fx

from repfuse.algebra.geometry import NotAffine
from repfuse.ops.meaning import Convolved, Meaning, Normed, Same, origin
from repfuse.placing.bodies import check_names, fused_names, holder_of, join, named_tensors, steps_of
from repfuse.placing.edits import Block, Candidate, Fused, Layout, owner_of, place_of
from repfuse.placing.local import Part, Replacement, local_graph, vanishing
from repfuse.placing.uses import Uses, call_signature
from repfuse.planning.regions import Region
from repfuse.tracing.trace import Traced
from repfuse.tracing.tracer import Call

Refuse = Callable[[NotAffine, fx.Node], None]


def lay_out(
    traced: Traced,
    candidates: Iterable[Candidate],
    meanings: dict[fx.Node, Meaning | None],
    ghosts: set[fx.Node],
    refuse: Refuse,
) -> Layout:
    """Decide owner and form of every candidate; what has no place is refused."""
    return _LayingOut(traced, meanings, ghosts, refuse).run(list(candidates))


class _LayingOut:
    def __init__(
        self, traced: Traced, meanings: dict[fx.Node, Meaning | None], ghosts: set[fx.Node], refuse: Refuse
    ) -> None:
        self.traced = traced
        self.meanings = meanings
        self.ghosts = ghosts
        self.refuse = refuse
        self.layout = Layout()
        self.uses = Uses(traced)

    def run(self, candidates: list[Candidate]) -> Layout:
        blocks: dict[Call, list[Candidate]] = defaultdict(list)
        for call, candidate in self._once_per_module(candidates):
            try:
                if not self._fold(call, candidate):
                    blocks[call].append(candidate)
            except NotAffine as error:
                self.refuse(error, candidate.region.root)
        for call, members in self._raised(self._whole(blocks)).items():
            try:
                self.layout.blocks.append(self._block(call, members))
            except NotAffine as error:
                for candidate in members:
                    self.refuse(error, candidate.region.root)
        return self.layout

    def _once_per_module(self, candidates: list[Candidate]) -> list[tuple[Call, Candidate]]:
        """Keep one of the calls of each owner: a module that is called often is rewritten once, or not at all."""
        found: dict[str, dict[Call, dict[tuple[int, ...], Candidate]]] = defaultdict(lambda: defaultdict(dict))
        for candidate in candidates:
            call = owner_of(self.traced, candidate.region)
            found[call.path][call][place_of(self.traced, candidate.region)] = candidate
        kept = []
        for path, by_call in found.items():
            calls = self.traced.calls[path]
            if all(by_call[call].keys() == by_call[calls[0]].keys() for call in calls):
                kept += [(calls[0], candidate) for candidate in by_call[calls[0]].values()]
                continue
            error = NotAffine("called-differently", f"{path!r} is called {len(calls)} times, not always alike")
            for candidate in (candidate for places in by_call.values() for candidate in places.values()):
                self.refuse(error, candidate.region.root)
        return kept

    def _fold(self, call: Call, candidate: Candidate) -> bool:
        """Lay out one convolution with its normalisations as a fold, if it is one and nothing else uses the modules."""
        region, group = candidate.region, candidate.groups[0]
        convolved = [node for node in region.working if isinstance(self.meanings[node], Convolved)]
        norms = [node for node in region.working if isinstance(self.meanings[node], Normed)]
        if len(region.groups) > 1 or len(convolved) != 1 or len(convolved) + len(norms) != len(region.working):
            return False
        (convolution,) = convolved
        if convolution.op != "call_module" or not all(self._alone(node, call) for node in (convolution, *norms)):
            return False
        bodies = [self._without(node, call) for node in norms if node.op != "call_module"]
        if None in bodies:
            return False
        self.layout.folds.append(Fused(str(convolution.target), call.path, "fold", region, group))
        self.layout.identities += [str(node.target) for node in norms if node.op == "call_module"]
        self.layout.blocks += [body for body in bodies if body is not None]
        return True

    def _alone(self, node: fx.Node, call: Call) -> bool:
        """Whether the module behind ``node`` runs once in every call of the owner, and nothing else uses it."""
        if node.op != "call_module":
            return True
        module = self.traced.module.get_submodule(str(node.target))
        keeps_tensors = isinstance(self.meanings[node], Convolved)
        runs_once = self.uses.runs[module] == len(self.traced.calls[call.path])
        return runs_once and not self.uses.reads(module, keeps_tensors)

    def _without(self, norm: fx.Node, owner: Call) -> Block | None:
        """Return the body of the module whose forward makes ``norm``, without it; None where it is the owner's own."""
        call = self.traced.call_of[norm]
        if call is owner or len(self.traced.calls[call.path]) != len(self.traced.calls[owner.path]):
            return None
        meaning = self.meanings[norm]
        assert isinstance(meaning, Normed)
        replacement = Replacement(norm, (Part(meaning.input, None),), frozenset({norm}))
        self._check_hooks(call.path)
        graph = local_graph(self.traced, call, [replacement], self.ghosts, self._origin)
        self._check_uses(call, graph)
        return Block(call.path, graph, self._steps(call, graph))

    def _whole(self, blocks: dict[Call, list[Candidate]]) -> dict[Call, list[Candidate]]:
        """Refuse what would take apart one call of a module that gets a new body for all its calls."""
        rewritten = {call.path for call in blocks}
        whole: dict[Call, list[Candidate]] = defaultdict(list)
        for call, members in blocks.items():
            for candidate in members:
                inner = {each for node in candidate.region.working for each in self.traced.call_of[node].up_to(call)}
                torn = [each.path for each in inner if each.path in rewritten and each not in blocks]
                if torn:
                    error = NotAffine("called-differently", f"another call of {torn[0]!r} is merged on its own")
                    self.refuse(error, candidate.region.root)
                else:
                    whole[call].append(candidate)
        return whole

    def _raised(self, blocks: dict[Call, list[Candidate]]) -> dict[Call, list[Candidate]]:
        """Move what lies in a module that an outer block dissolves up to that block."""
        raised: dict[Call, list[Candidate]] = defaultdict(list)
        for call in sorted(blocks, key=lambda call: call.start):
            raised[self._dissolver(call, raised)] += blocks[call]
        return raised

    def _dissolver(self, call: Call, outer: dict[Call, list[Candidate]]) -> Call:
        for above in reversed(list(call.chain())):
            nodes = (node for candidate in outer.get(above, ()) for node in candidate.region.working)
            if any(call in self.traced.call_of[node].chain() for node in nodes):
                return above
        return call

    def _block(self, call: Call, candidates: list[Candidate]) -> Block:
        """Lay out every candidate of one owner as the owner's new body."""
        fused = [(candidate, group) for candidate in candidates for group in candidate.groups]
        names = fused_names(self.traced.module.get_submodule(call.path), len(fused))
        name_of = {id(group): name for (_, group), name in zip(fused, names, strict=True)}
        replacements = [self._replacement(call, candidate.region, name_of) for candidate in candidates]
        for path in {inner.path for r in replacements for n in r.nodes for inner in self._above(n, call)}:
            self._check_hooks(path)
        graph = local_graph(self.traced, call, replacements, self.ghosts, self._origin)
        kept, steps = self._unread(call, replacements, graph), self._steps(call, graph)
        self._check_uses(call, graph, kept)
        form = "graph" if steps is None or kept else "chain"
        if form == "graph":
            check_names(graph)
        # A block that is one convolution and nothing else is that convolution, unless its class names a place for it.
        alone = form == "chain" and steps == ("fused",)
        written = tuple(
            Fused(call.path if alone else join(call.path, name), call.path, form, candidate.region, group)
            for (candidate, group), name in zip(fused, names, strict=True)
        )
        return Block(call.path, graph, steps if form == "chain" else None, written, names, kept)

    def _replacement(self, call: Call, region: Region, name_of: dict[int, str]) -> Replacement:
        parts = tuple(Part(group.source, name_of.get(id(group))) for group in region.groups)
        root, after = self._end(call, region.root)
        within = (node for node in (*region.nodes, *after) if call.start <= self.traced.order[node] < call.stop)
        return Replacement(root, parts, frozenset(within))

    def _end(self, call: Call, root: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Follow no-ops that are operations (``x + 0``) in the block; modules that are no-ops stay at its end."""
        end, after, passed = root, list[fx.Node](), list[fx.Node]()
        while len(readers := [user for user in root.users if user not in self.ghosts]) == 1:
            (root,) = readers
            passed.append(root)
            if not isinstance(self.meanings[root], Same) or self.traced.order[root] >= call.stop:
                break
            if root.op != "call_module":
                end, after = root, list(passed)
        return end, after

    def _above(self, node: fx.Node, call: Call) -> list[Call]:
        return [*self.traced.call_of[node].up_to(call), call]

    def _unread(self, call: Call, replacements: list[Replacement], graph: fx.Graph) -> tuple[str, ...]:
        """Return the tensors in the owner that neither the old nor the new body uses."""
        used = [f"{node.target}." for node in graph.nodes if node.op in ("call_module", "get_attr")]
        vanished = vanishing(self.traced, call, replacements, self.ghosts)
        holders = {holder_of(node) for node in vanished} - {call.path}
        read = {str(node.target) for node in vanished if node.op == "get_attr"}
        owner = self.traced.module.get_submodule(call.path)
        return tuple(
            name
            for name, _ in named_tensors(owner)
            if join(call.path, name) not in read
            and join(call.path, name.rpartition(".")[0]) not in holders
            and not any(f"{name}.".startswith(path) for path in used)
        )

    def _steps(self, call: Call, graph: fx.Graph) -> tuple[str, ...] | None:
        """Return the modules that the graph is in a row, if it is; a row of modules takes no arguments by name."""
        return None if any(other.kwargs for other in self.traced.calls[call.path]) else steps_of(graph)

    def _check_uses(self, call: Call, graph: fx.Graph, kept: tuple[str, ...] = ()) -> None:
        """Raise NotAffine where one new body, ``graph``, does not serve every call, or hides what others reach for."""
        calls = self.traced.calls[call.path]
        if len(calls) > 1 and len({call_signature(self.traced, other, self._origin) for other in calls}) > 1:
            raise NotAffine("called-differently", f"{call.path!r} is called with other arguments each time")
        there = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        for target in self.uses.reached[call.path]:
            name = target[len(call.path) + 1 :]
            if name not in kept and not any(f"{name}.".startswith(f"{path}.") for path in there):
                raise NotAffine("outer-reference", f"{target!r} is used from outside of {call.path!r}")

    def _origin(self, node: fx.Node) -> fx.Node:
        return origin(node, self.meanings)

    def _check_hooks(self, path: str) -> None:
        module = self.traced.module.get_submodule(path)
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotAffine("hooks", f"{path or 'the model'} carries forward hooks, which the rewrite would lose")
