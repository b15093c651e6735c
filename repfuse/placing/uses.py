"""Who uses what, beyond the plain call of a child by its parent: what a rewrite must not pull away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from torch import fx, nn
from torch.fx.node import map_arg

from repfuse.recording.calls import Call
from repfuse.recording.recording import Recording


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
        for node in recording.nodes:
            if node.op == "get_attr":
                self._read[self._tensors[str(node.target)]].append(node)
                self._reach(str(node.target), recording.call_of[node])
        for path, calls in recording.calls.items():
            for call in calls:
                self._reach(path, call)
        for target in recording.elsewhere:
            self._reach(target, Call("", 0, None))

    def _reach(self, target: str, call: Call) -> None:
        """Note that a call uses ``target``, a module or a tensor, for each module around it that is not under way."""
        inside = {each.path for each in call.chain()}
        for name in self._names_of(target):
            for above in _above(name):
                path = self._recording.paths(above)[0]
                if path not in inside:
                    self.reached[path].append(path + name[len(above) :])

    def _names_of(self, target: str) -> list[str]:
        if target in self._recording.modules:
            return self._recording.paths(target)
        return self._other_names[self._tensors[target]]

    def reads(self, module: nn.Module, path: str, keeps_tensors: bool) -> bool:
        """Whether others than the module at ``path`` read tensors of it: where it keeps them, the numbers of them."""
        for tensor in (*module.parameters(), *module.buffers()):
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


def call_signature(recording: Recording, call: Call, origin: Callable[[fx.Node], fx.Node]) -> str:
    """Return what a call does, its arguments apart: equal for two calls if one graph serves both."""
    given: list[fx.Node] = []
    map_arg((call.args, call.kwargs), given.append)
    values = [origin(node) for node in given]

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


def _above(target: str) -> list[str]:
    parts = target.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
