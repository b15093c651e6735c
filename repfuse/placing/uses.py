"""Who uses what, beyond the plain call of a child by its parent: what a rewrite must not pull away."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from torch import fx, nn
from torch.fx.node import map_arg

from repfuse.tracing.trace import Traced
from repfuse.tracing.tracer import Call

_METADATA = frozenset({"device", "dtype", "ndim", "requires_grad", "shape"})


class Uses:
    """``runs`` counts the calls of each leaf module; ``reached`` lists, for a module's path, what within it is used by
    others than itself."""

    def __init__(self, traced: Traced) -> None:
        self.runs: Counter[nn.Module] = Counter()
        self.reached: dict[str, list[str]] = defaultdict(list)
        self._read: dict[int, list[fx.Node]] = defaultdict(list)
        self._tensors = {name: id(tensor) for name, tensor in traced.module.named_parameters()}
        self._tensors |= {name: id(tensor) for name, tensor in traced.module.named_buffers()}
        for node in traced.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            target = str(node.target)
            if node.op == "call_module":
                self.runs[traced.module.get_submodule(target)] += 1
            else:
                self._read[self._tensors.get(target, 0)].append(node)
            inside = {call.path for call in traced.call_of[node].chain()}
            for path in _above(target):
                if path not in inside:
                    self.reached[path].append(target)

    def reads(self, module: nn.Module, keeps_tensors: bool) -> bool:
        """Whether a forward reads tensors of ``module``: where it keeps them, other than for their shape or dtype."""
        nodes = (node for tensor in (*module.parameters(), *module.buffers()) for node in self._read[id(tensor)])
        return any(not keeps_tensors or not all(map(_is_metadata, node.users)) for node in nodes)


def call_signature(traced: Traced, call: Call, origin: Callable[[fx.Node], fx.Node]) -> str:
    """Return what a call does, its arguments apart: equal for two calls if one graph serves both."""
    given: list[fx.Node] = []
    map_arg((call.args, call.kwargs), given.append)
    values = [origin(node) for node in given]

    def name(node: fx.Node) -> str:
        position = traced.order[node]
        if call.start <= position < call.stop:
            return f"%{position - call.start}"
        return f"argument {given.index(node)}" if node in given else node.name

    steps = [
        (node.op, node.target, map_arg((node.args, node.kwargs), name)) for node in traced.nodes[call.start : call.stop]
    ]
    same_values = [values.index(value) for value in values]
    return repr((len(call.args), tuple(call.kwargs), same_values, steps, map_arg(call.output, name)))


def _above(target: str) -> list[str]:
    parts = target.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _is_metadata(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in _METADATA
