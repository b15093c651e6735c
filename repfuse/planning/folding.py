"""Modules in a row that become one of them: the plainest rewrite, since everything around stays as it is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvNd

from repfuse.algebra.expression import Joined, Scaled, Through
from repfuse.algebra.layers import Convolution, Normalisation
from repfuse.networks import named_tensors
from repfuse.ops.meaning import Rearranged, convolves
from repfuse.ops.table import Meanings
from repfuse.planning.region import Region
from repfuse.plans import above
from repfuse.recording.recording import Recording
from repfuse.recording.run import ModuleCall
from repfuse.recording.stock import is_stock

# Who uses what, beyond the plain call of a child by its parent: what a rewrite must not pull away.


class Uses:
    """``reached`` lists, for a module's path, what within it is used by others than itself."""

    def __init__(self, recording: Recording) -> None:
        self.reached: dict[str, list[str]] = defaultdict(list)
        self._recording = recording
        self._tensors = {name: id(x) for name, x in recording.constants.tensors.items()}
        self._other_names: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self._tensors.items():
            self._other_names[tensor].append(name)
        self._read: dict[int, list[fx.Node]] = defaultdict(list)
        self._elsewhere = {self._tensors[name] for name in recording.elsewhere}
        self._passed_over = cache(self._passed_over_by)
        for node in recording.nodes:
            if node.op == "get_attr":
                self._read[self._tensors[str(node.target)]].append(node)
                self._reach(str(node.target), recording.call_of[node])
        for path, calls in recording.calls.items():
            for call in calls:
                if call.caller is not None:
                    self._reach(path, call.caller)
        for target in recording.elsewhere:
            self._reach(target, ModuleCall.outermost())

    def _reach(self, target: str, call: ModuleCall) -> None:
        """Note that a call uses ``target``, a module or a tensor, for each module around it that is not under way."""
        if target.rpartition(".")[0] == call.path and len(self.names_of(target)) == 1:  # as nearly always
            for path in self._passed_over(call):
                self.reached[path].append(target)
            return
        inside = {each.path for each in call.chain()}
        for name in self._names_for(target, call):
            for outer in above(name):
                path = self._recording.paths[outer][0]
                if path not in inside:
                    self.reached[path].append(path + name[len(outer) :])

    def _passed_over_by(self, call: ModuleCall) -> list[str]:
        """Return the paths of the modules around the called one that are not under way: none, where each called the
        next.
        """
        inside = {each.path for each in call.chain()}
        return [path for path in above(call.path) if path not in inside]

    def _names_for(self, target: str, call: ModuleCall) -> list[str]:
        """Return the names by which the call may have found ``target``: of what it holds itself, its own."""
        names = self.names_of(target)
        for each in call.chain() if len(names) > 1 else ():
            within = tuple(f"{path}." for path in self._recording.paths[each.path] if path)
            own = [name for name in names if f"{name}.".startswith(within)]
            if own != names:
                return own or names
        return names

    def names_of(self, target: str) -> list[str]:
        """Return all names of a module or a tensor."""
        if target in self._recording.modules:
            return self._recording.paths[target]
        return self._other_names[self._tensors[target]]

    def reads(self, module: nn.Module, path: str, keeps_tensors: bool) -> bool:
        """Whether others than the module at ``path`` read tensors of it: where it keeps them, the numbers of them."""
        for _, tensor in named_tensors(module):
            if id(tensor) in self._elsewhere:
                return True
            others = [node for node in self._read[id(tensor)] if not self._is_within(node, path)]
            if any(not keeps_tensors or not all(map(self._measures, node.users)) for node in others):
                return True
        return False

    def _is_within(self, node: fx.Node, path: str) -> bool:
        return any(call.path == path for call in self._recording.call_of[node].chain())

    def _measures(self, node: fx.Node) -> bool:
        return node not in self._recording.shape_of and node.op in ("call_function", "call_method")


def call_signature(meanings: Meanings, call: ModuleCall) -> str:
    """Return what a call does, its arguments apart: equal for two calls if one graph serves both."""
    recording, given = meanings.recording, list[fx.Node]()
    map_arg((call.args, call.kwargs), given.append)
    values = list(map(meanings.origin, given))

    def name(node: fx.Node) -> str:
        position = recording.order[node]
        if call.start <= position < call.stop:
            return f"%{position - call.start}"
        return f"argument {given.index(node)}" if node in given else node.name

    steps = [
        (node.op, node.target, map_arg((node.args, node.kwargs), name))
        for node in recording.nodes[call.start : call.stop]
    ]
    same_values = [values.index(value) for value in values]
    arguments = map_arg((call.args, call.kwargs), lambda _: "a tensor")
    return repr((arguments, same_values, steps, map_arg(call.output, name)))


@dataclass(frozen=True)
class ModuleRow:
    """``convolution`` is the module that becomes the fused one; if it ``stays``, that takes new weights alone.

    ``others`` are modules that become no-ops, ``norms`` normalisations that forwards of their own compute.
    """

    convolution: str
    stays: bool
    others: tuple[str, ...]
    norms: tuple[fx.Node, ...]


class Folding:
    """Finds such rows in one recorded network."""

    def __init__(self, meanings: Meanings) -> None:
        self.recording = meanings.recording
        self.meanings = meanings
        self.uses = Uses(self.recording)

    def row(self, region: Region, owner: ModuleCall, alike: list[Region]) -> ModuleRow | None:
        """Return the region as a row of modules, if it is one and nothing else uses the modules.

        ``alike`` are all regions of the owner's call that are the same map: those of modules that it calls in a loop.
        """
        layers = [node for node in region.working if isinstance(self.meanings[node], Through)]
        norms = [node for node in region.working if self._normalises(node)]
        nodes = sorted((*layers, *norms), key=self.recording.order.__getitem__)
        call_of = {node: self._call(node, owner) for node in nodes}
        refuses = any(group.expression.geometry.fits for group in region.groups)
        before = self.meanings.before_phases(region.nodes)
        convolving = [node for node in before if convolves(self.meanings[node])]
        if (
            refuses
            or not convolving
            or len(region.groups) > 1
            or len(nodes) != len(region.working)
            or not all(call_of[node] for node in layers)
        ):
            return None
        convolution = convolving[-1]
        call = call_of[convolution]
        assert call is not None
        stays = {call_of[node] for node in layers} == {call} and self._stays(convolution, call)
        stays = stays and not region.groups[0].expression.has_ones
        units = {each: each is call and stays for each in call_of.values() if each is not None}
        if not all(self._alone(each, owner, alike, keeps=keeps) for each, keeps in units.items()):
            return None
        if not stays and (len(alike) > 1 or self._is_moved_before(layers, convolution, region)):
            return None
        if not stays and not (self._is_replaceable(call, convolution, region) and self._unseen(region)):
            return None
        others = [(each, node) for node, each in call_of.items() if each is not None and each is not call]
        if not all(self._is_replaceable(each, node, region) for each, node in others):
            return None
        return ModuleRow(
            call.path,
            stays,
            tuple(dict.fromkeys(each.path for each, _ in others)),
            tuple(node for node in norms if call_of[node] is None),
        )

    def rows(self, region: Region, owner: ModuleCall) -> list[ModuleRow] | None:
        """Return what ``row`` does for each of the groups that a region joins, where each layer takes new numbers alone
        and modules make what is between.
        """
        found = []
        for group in region.groups:
            joins = {node for node in group.nodes if isinstance(self.meanings[node], Joined)}
            part = Region(region.root, (group,), group.nodes & region.working - joins, group.nodes & region.passing)
            row = self.row(part, owner, [part])
            if row is None or not row.stays or row.norms:
                return None
            found.append(row)
        return found

    def _is_moved_before(self, layers: list[fx.Node], convolution: fx.Node, region: Region) -> bool:
        """Whether values are put elsewhere between the convolution and a layer after it: there the map would be."""
        order = self.recording.order
        last = max(map(order.__getitem__, layers))
        moves = ((node, self.meanings[node]) for node in region.nodes)
        stays = (node for node, meaning in moves if isinstance(meaning, Rearranged) and not meaning.phases)
        return any(order[convolution] < order[node] < last for node in stays)

    def _call(self, node: fx.Node, owner: ModuleCall) -> ModuleCall | None:
        """Return the call of a module of PyTorch's, or of one that convolves its own way, that made the node.

        None where another forward did.
        """
        call = self.recording.call_of[node]
        module = self.recording.modules[call.path]
        known = is_stock(module) or (isinstance(module, _ConvNd | nn.Linear) and convolves(self.meanings[node]))
        return call if known and call is not owner else None

    def _normalises(self, node: fx.Node) -> bool:
        meaning = self.meanings[node]
        return isinstance(meaning, Scaled) and isinstance(meaning.by, Normalisation)

    def _stays(self, node: fx.Node, call: ModuleCall) -> bool:
        """Whether the module only needs other numbers: it convolves with its own weight, as it is, and has a bias or a
        place for one.
        """
        meaning, module = self.meanings[node], self.recording.modules[call.path]
        assert isinstance(meaning, Through) and isinstance(meaning.layer, Convolution)
        layer, table, tensors = meaning.layer, module._parameters, self.recording.constants.tensors
        weight = tensors.get(layer.weight)
        own = isinstance(module, _ConvNd | nn.Linear) and weight is not None and table.get("weight") is weight
        bias = None if layer.bias is None else tensors.get(layer.bias)
        return own and "bias" in table and table["bias"] is bias and (bias is not None or layer.bias is None)

    def _alone(self, call: ModuleCall, owner: ModuleCall, alike: list[Region], *, keeps: bool) -> bool:
        """Whether the module runs once for each of these regions in a call of the owner, and nothing else uses it."""
        module, calls = self.recording.modules[call.path], self.recording.calls
        paths = [[self.recording.call_of[node].path for node in each.working] for each in alike]
        once = all(path.count(call.path) == 1 for path in paths) or len(alike) == 1
        once = once and len(calls[call.path]) == len(alike) * len(calls[owner.path])
        return once and not self.uses.reads(module, call.path, keeps)

    def _is_replaceable(self, call: ModuleCall, node: fx.Node, region: Region) -> bool:
        """Whether the module computes the node and nothing else."""
        if call.output is not node or not is_stock(self.recording.modules[call.path]):
            return False
        own = (item for item in call.own if isinstance(item, fx.Node) and item in self.recording.shape_of)
        return all(item in region.nodes or self.recording.constants.is_constant(item) for item in own)

    def _unseen(self, region: Region) -> bool:
        """Whether nothing looks at a value within the row but at its rank: one of another shape will pass there."""
        readers = (user for node in region.nodes if node is not region.root for user in node.users)
        return all(user in region.nodes or user.target == "dim" for user in readers)
