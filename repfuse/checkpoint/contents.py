"""Where in a file the network is: a module, a bare state dict, or one of these inside a training checkpoint.

It is taken out of what a program put around it and its modules, and pickled with them: torch.compile, DataParallel, ...
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from repfuse.checkpoint.around import Around, around_of
from repfuse.checkpoint.choice import BARE, KINDS, ChosenWeights, all_ways, choose, is_network, is_state_dict, ways
from repfuse.checkpoint.inert import Record, module_state
from repfuse.errors import RepfuseError
from repfuse.networks import join
from repfuse.wording import listed

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = "repfuse"  # the attribute, or the metadata key, that holds the recipe


@dataclass(frozen=True)
class Contents:
    """The network in a file: a ``module`` (real, or a record) or a ``state`` dict; and what is ``around`` it.

    ``state`` has the names of the file; ``chosen`` says which of them are meant where several networks share them.
    ``recipe`` is the text that repfuse left with a state dict, ``notes`` what the user must be told.
    """

    module: Any = None
    state: OrderedDict[str, Tensor] | None = None
    recipe: Any = None
    around: Around = Around()  # noqa: RUF009 - it is frozen
    chosen: ChosenWeights = BARE
    notes: tuple[str, ...] = ()


def find(tree: Any, path: Path, weights: str = "auto") -> Contents:
    """Return the network in ``tree``; ``weights`` says which of several: ``auto``, ``ema``, ``model`` or a dotted key.

    Raises RepfuseError where there is none, or not that one.
    """
    tree, notes = unwrapped(tree)
    if is_network(tree) or isinstance(tree, Record):
        return _contents(tree, tree, _of_bare(tree, weights, path), notes)
    if not isinstance(tree, dict):
        raise no_network(path, f"It holds one object of type {type(tree).__name__}.")
    chosen = choose(tree, weights)
    if chosen is None:
        raise _not_there(tree, path, weights)
    return _contents(Around(chosen.way).take(tree), tree, chosen, (*notes, *_notes(tree, chosen)))


def _contents(value: Any, tree: Any, chosen: ChosenWeights, notes: tuple[str, ...]) -> Contents:
    around = around_of(tree, chosen.way) if chosen.way else Around()
    if not isinstance(value, dict):
        return Contents(module=value, around=around, chosen=chosen, notes=notes)
    state = OrderedDict(value)
    vars(state).update({"_metadata": value._metadata} if hasattr(value, "_metadata") else {})
    return Contents(None, state, getattr(value, RECIPE, None), around, chosen, notes)


def _of_bare(network: Any, weights: str, path: Path) -> ChosenWeights:
    if weights == "auto" or (weights in KINDS and is_state_dict(network)):
        return ChosenWeights((), kind=weights)
    if is_state_dict(network) and any(name.startswith(f"{weights}.") for name in network):
        return ChosenWeights((), f"{weights}.")
    raise RepfuseError(f"{path} holds one network, and no choice of weights.", "", "Leave out --weights.")


def _notes(tree: dict[Any, Any], chosen: ChosenWeights) -> tuple[str, ...]:
    """Say which network was taken, where there is another to choose."""
    averaged, trained = ways(tree)
    others = [".".join(way) for way in (*averaged, *trained) if way != chosen.way]
    if not others:
        return ()
    kind = "averaged " if chosen.way in averaged else "trained " if chosen.way in trained else ""
    also = ", ".join(f"{other!r} (--weights {other})" for other in others)
    return (f"took the {kind}weights under {'.'.join(chosen.way)!r}; the file also has {also}",)


def _not_there(tree: dict[Any, Any], path: Path, weights: str) -> RepfuseError:
    wanted = {
        "auto": "no state dict and no network under a usual name",
        "ema": "no averaged weights",
        "model": "no trained weights",
    }.get(weights, f"no network under {weights!r}")
    error = no_network(path, f"It is a dictionary with {wanted}. Its keys: {listed(tree) or 'none'}.")
    if found := list(all_ways(tree)):
        error = RepfuseError(
            f"{path} holds no network where it was looked for.",
            error.why,
            f"It has networks under {listed(found)}: choose one, as --weights {found[0]}.",
        )
    return error


def no_network(path: Path, why: str) -> RepfuseError:
    """Return the error for a file that loads and has nothing in it for repfuse."""
    return RepfuseError(
        f"{path} holds no network.",
        why,
        "Give a network, a state dict, or a training checkpoint that has one under 'state_dict', 'model' or the like.",
    )


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
    while id(value) not in worn:
        worn.add(id(value))
        cls = type(value)
        name = str(value.origin) if isinstance(value, Record) else f"{cls.__module__}.{cls.__qualname__}"
        kind, child = WRAPPERS.get(name, ("", ""))
        inner = _children(value).get(child)
        if inner is None and isinstance(value, Record):  # torch.compile's wrapper is pickled as a call with the network
            inner = next((given for given in value.args[:1] if isinstance(given, Record)), None)
        if not kind or inner is None:
            break
        value = inner
        kinds.append(kind)
    return value, kinds


def _children(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, nn.Module):
        return value._modules
    state = module_state(value)
    return dict.get(state, "_modules", {}) if state else {}
