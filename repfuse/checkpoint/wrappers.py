"""What a program put around a network and its modules, and pickled with them: torch.compile, DataParallel, ..."""

from __future__ import annotations

from typing import Any

from torch import nn

from repfuse.checkpoint.inert import Record, module_state
from repfuse.networks import join
from repfuse.wording import listed

WRAPPERS = {  # what to call it, and the child that is the network
    "torch.nn.parallel.data_parallel.DataParallel": ("DataParallel", "module"),
    "torch.nn.parallel.distributed.DistributedDataParallel": ("DistributedDataParallel", "module"),
    "torch._dynamo.eval_frame.OptimizedModule": ("torch.compile", "_orig_mod"),
    "torch.optim.swa_utils.AveragedModel": ("AveragedModel", "module"),
}


def unwrapped(tree: Any) -> tuple[Any, tuple[str, ...]]:
    """Return ``tree`` with each network in it, real or a record, taken out of its wrappers, and what to say of that."""
    root, seen = {"": tree}, set[int]()
    whole, parts = set[str](), dict[str, list[str]]()
    tables = [("", root, False)]
    while tables:
        path, table, within = tables.pop()
        if id(table) in seen:
            continue
        seen.add(id(table))
        for name in table:
            where, (table[name], kinds) = join(path, str(name)), _bare(table[name])
            for kind in kinds:
                parts.setdefault(kind, []).append(where) if within else whole.add(kind)
            tables.append((where, _children(table[name]), within or not isinstance(table[name], dict)))
    notes = [f"took the network out of its {kind} wrapper" for kind in sorted(whole)]
    return root[""], (*notes, *(f"took the {kind} wrapper off {listed(paths)}" for kind, paths in parts.items()))


def _bare(value: Any) -> tuple[Any, list[str]]:
    """Return what is in the wrappers around ``value``, and what they are called."""
    kinds: list[str] = []
    worn = set[int]()  # a file may put a wrapper into itself
    while id(value) not in worn and (known := WRAPPERS.get(_class_of(value))):
        worn.add(id(value))
        kind, child = known
        inner = _children(value).get(child) or _called_with(value)
        if inner is None:
            break
        value = inner
        kinds.append(kind)
    return value, kinds


def _called_with(value: Any) -> Record | None:
    """Return the record that a file would call a class with, as torch.compile's wrapper is pickled."""
    if isinstance(value, Record) and value.args and isinstance(value.args[0], Record):
        return value.args[0]
    return None


def _class_of(network: Any) -> str:
    if isinstance(network, Record):
        return str(network.origin)
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _children(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, nn.Module):
        return value._modules
    state = module_state(value)
    return dict.get(state, "_modules", {}) if state else {}
