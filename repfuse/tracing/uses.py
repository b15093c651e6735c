"""Who uses a module: what only one graph runs may change with it, anything else must stay as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from repfuse.tracing.leaves import hooks_of
from repfuse.tracing.trace import Traced
from repfuse.tracing.watching import Entered


@dataclass(frozen=True)
class Uses:
    """What is known of all parts of a network.

    ``in_graphs`` are the modules that the graph of each part runs, ``entered`` those that an opaque forward calls, and
    ``touched`` those whose insides each opaque forward reads. ``opaque`` are the modules of these forwards.
    """

    in_graphs: Mapping[nn.Module, set[nn.Module]]
    entered: Mapping[nn.Module, Entered]
    touched: Mapping[nn.Module, set[nn.Module]]
    opaque: Collection[nn.Module]

    def shared(self, part: nn.Module) -> frozenset[str]:
        """Return the paths, within ``part``, of the modules that anything but its graph uses, as far as is known."""
        used = set().union(*self.touched.values(), self.entered.keys() - {part}, *self._insides_without(part))
        used.update(*(modules for other, modules in self.in_graphs.items() if other is not part))
        return frozenset(path for path, inner in part.named_modules() if inner in used)

    def alone(self, block: nn.Module) -> bool:
        """Whether nobody else uses what is in the block, and nothing in it has hooks."""
        inside = set(block.modules())
        used = [*(touched for by, touched in self.touched.items() if by not in inside)]
        used += [modules for part, modules in self.in_graphs.items() if part not in inside]
        used += [{inner for inner, entry in self.entered.items() if entry.callers - inside}]
        return all(each.isdisjoint(inside - {block}) for each in used) and not any(map(hooks_of, inside))

    def _insides_without(self, part: nn.Module) -> Iterator[set[nn.Module]]:
        """Yield the modules within each opaque module that does not hold ``part`` itself."""
        for module in self.opaque:
            insides = set(module.modules())
            if part not in insides:
                yield insides - {module}


def modules_in_graph(part: nn.Module, traced: Traced) -> set[nn.Module]:
    """Return the modules that a graph runs, but not opaque ones and not the outermost."""
    paths = [path for path in traced.calls if path]
    paths += [str(node.target) for node in traced.nodes if node.op == "call_module"]
    return {part.get_submodule(path) for path in paths if path not in traced.opaque}
