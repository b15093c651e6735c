"""Where in a file the network is: a module, a bare state dict, or one of these inside a training checkpoint.

Of several it is the averaged one, the trained one, or one by its key. It is taken out of what a program put around it
and its modules, and pickled with them: torch.compile, DataParallel, ... What else a training checkpoint holds goes with
it into the file that is written, as far as it is harmless and stays true.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repfuse.checkpoint.records import NotPlainError, Plain, Record, module_state, state_of_record
from repfuse.checkpoint.weights import BARE, SEGMENTS, ChosenWeights, Naming, without
from repfuse.errors import RepfuseError
from repfuse.networks import join
from repfuse.wording import listed

RECIPE = "repfuse"  # the attribute, or the metadata key, that holds the recipe
Way = tuple[str, ...]

AVERAGED: Way = ("state_dict_ema", "model_ema", "ema", "ema_model", "params_ema", "ema_state_dict")
TRAINED: Way = ("state_dict", "model_state_dict", "model_state", "model", "module", "params", "net", "network")
KEYS = (*AVERAGED, *TRAINED)  # averaged weights first, as timm and YOLO do: they are evaluated and shipped
DEPTH = 3  # of dictionaries, to look for networks that could be named
KINDS = ("auto", "ema", "model")
TRAINING = ("optim", "scaler", "scaling", "scheduler")  # parts of the keys of training state
STALE = "it belongs to the training and no longer fits"
COPY = "another copy of the weights"
ASKED = "as --drop-metadata asks"


@dataclass(frozen=True)
class Around:
    """What a file is without its network.

    ``keys`` lead to the network in the dictionaries of a training checkpoint (none where it is bare), ``others`` are
    the other entries of each of these dictionaries, as far as they stay true. ``left_out`` says of each other why it
    does not, ``notes`` what was changed. ``naming`` is how a state dict names the network's weights.
    """

    keys: tuple[str, ...] = ()
    others: tuple[dict[Any, Any], ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    naming: Naming = Naming()  # noqa: RUF009 - it is frozen

    def put(self, network: Any) -> Any:
        """Return the data to write: ``network``, inside the training checkpoint where there was one."""
        for key, others in reversed(list(zip(self.keys, self.others, strict=True))):
            network = others | {key: network}
        return network

    def take(self, data: Any) -> Any:
        """Return the network in ``data``: the inverse of ``put``."""
        for key in self.keys:
            data = data[key]
        return data

    def kept(self) -> list[str]:
        """Return the dotted keys of what goes into the file that is written."""
        return [
            ".".join([*self.keys[:depth], str(key)])
            for depth, others in enumerate(self.others)
            for key in others
            if key != self.keys[depth]
        ]

    def without_metadata(self) -> Around:
        """Return it with nothing but the keys to the network."""
        dropped = dict.fromkeys(self.kept(), ASKED)
        return replace(self, others=tuple({} for _ in self.keys), left_out=self.left_out | dropped, notes=())

    def said(self) -> list[str]:
        """Return what the user must be told of the file that is written."""
        reasons: dict[str, list[str]] = {}
        for key, why in self.left_out.items():
            reasons.setdefault(why, []).append(key)
        kept = [f"kept from the training checkpoint: {', '.join(self.kept())}"] if self.kept() else []
        gone = [f"left out of the training checkpoint: {', '.join(keys)} ({why})" for why, keys in reasons.items()]
        return [*kept, *self.notes, *gone]


@dataclass(frozen=True)
class Contents:
    """The network in a file: a ``module`` (real, or a record) or a ``state`` dict; and what is ``around`` it.

    ``state`` has the names of the file; ``chosen`` says which of them are meant where several networks share them.
    ``recipe`` is the text that repfuse left with a state dict, ``notes`` what the user must be told.
    """

    module: Any = None
    state: OrderedDict[str, Tensor] | None = None
    recipe: Any = None
    around: Around = Around()
    chosen: ChosenWeights = BARE
    notes: tuple[str, ...] = ()


def find(tree: Any, path: Path, weights: str = "auto") -> Contents:
    """Return the network in ``tree``; ``weights`` says which of several: ``auto``, ``ema``, ``model`` or a dotted key.

    Raises RepfuseError where there is none, or not that one.
    """
    tree, notes = unwrapped(tree)
    bare = is_network(tree) or isinstance(tree, Record)
    if not bare and not isinstance(tree, dict):
        raise no_network(path, f"It holds one object of type {type(tree).__name__}.")
    of_weights = is_state_dict(tree)
    if bare and (weights == "auto" or (weights in KINDS and of_weights)):
        chosen: ChosenWeights | None = ChosenWeights(kind=weights)
    else:
        chosen = _choose(tree, weights) if not bare else _named(tree, weights) if of_weights else None
    if chosen is None:
        raise _not_there(tree, path, weights, bare=bare)
    around = _around(tree, chosen.way) if chosen.way else Around()
    value, notes = around.take(tree), (*notes, *(() if bare else _notes(tree, chosen)))
    if not isinstance(value, dict):
        return Contents(module=value, around=around, chosen=chosen, notes=notes)
    state = OrderedDict(value)
    vars(state).update({"_metadata": value._metadata} if hasattr(value, "_metadata") else {})
    return Contents(None, state, getattr(value, RECIPE, None), around, chosen, notes)


def _choose(tree: dict[Any, Any], weights: str) -> ChosenWeights | None:
    if named := _named(tree, weights):
        return named
    averaged, trained = _ways(tree)
    wanted = {"auto": (*averaged, *trained), "ema": averaged, "model": trained}.get(weights, ())
    if wanted:
        return ChosenWeights(wanted[0], kind="auto" if wanted[0] in averaged else weights)
    return ChosenWeights(trained[0], kind="ema") if weights == "ema" and trained else None


def _ways(tree: dict[Any, Any]) -> tuple[list[Way], list[Way]]:
    """Return the keys to the (averaged, trained) networks under the usual names, the preferred ones first.

    Two libraries exchange the weights when they save, so that the averaged ones are under the usual key.
    """
    meta, averaged, trained = tree.get("meta"), AVERAGED, TRAINED
    of_mmengine = "message_hub" in tree or (isinstance(meta, Mapping) and "mmengine_version" in meta)
    if of_mmengine and "ema_state_dict" in tree:
        averaged, trained = ("state_dict",), ("ema_state_dict",)
    elif "current_model_state" in tree and "averaging_state" in tree:  # Lightning
        averaged, trained = ("state_dict",), ("current_model_state",)
    return _under(tree, averaged), _under(tree, trained)


def _under(tree: dict[Any, Any], names: Way) -> list[Way]:
    found: list[Way] = []
    for name in names:
        value = tree.get(name)
        if is_network(value):
            found.append((name,))
        elif isinstance(value, dict):
            found += [(name, inner) for inner in KEYS if is_network(value.get(inner))][:1]
    return found


def _named(tree: Any, key: str) -> ChosenWeights | None:
    """Return the network at a dotted key, which may go on into the names of its weights: ``state_dict.student``."""
    if is_state_dict(tree):
        prefix = f"{key}." if key else ""
        return ChosenWeights((), prefix) if any(name.startswith(prefix) for name in tree) else None
    if is_network(tree):
        return None if key else ChosenWeights()
    if not isinstance(tree, dict):
        return None
    if not key:
        return next((ChosenWeights((inner,)) for inner in KEYS if is_network(tree.get(inner))), None)
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):  # a key may hold dots itself
        first, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
        if first in tree and (found := _named(tree[first], rest)):
            return found._replace(way=(first, *found.way))
    return None


def _all_ways(tree: Any, depth: int = DEPTH) -> Iterator[str]:
    """Yield the dotted keys of all networks in ``tree``, to tell the user."""
    for key, value in tree.items() if isinstance(tree, dict) and depth else ():
        if is_network(value):
            yield str(key)
        else:
            yield from (f"{key}.{inner}" for inner in _all_ways(value, depth - 1))


def is_network(value: Any) -> bool:
    """Say whether ``value`` is a module (real, or a record) or a state dict."""
    return isinstance(value, nn.Module) or module_state(value) is not None or is_state_dict(value)


def is_state_dict(value: Any) -> bool:
    """Say whether ``value`` is a state dict: names to tensors, at least one."""
    if not isinstance(value, dict) or not any(isinstance(held, Tensor) for held in value.values()):
        return False
    tensors = (isinstance(held, Tensor) or key.endswith("_extra_state") for key, held in value.items())
    return all(isinstance(key, str) for key in value) and all(tensors)


def _notes(tree: dict[Any, Any], chosen: ChosenWeights) -> tuple[str, ...]:
    """Say which network was taken, where there is another to choose."""
    averaged, trained = _ways(tree)
    others = [".".join(way) for way in (*averaged, *trained) if way != chosen.way]
    if not others:
        return ()
    kind = "averaged " if chosen.way in averaged else "trained " if chosen.way in trained else ""
    also = ", ".join(f"{other!r} (--weights {other})" for other in others)
    return (f"took the {kind}weights under {'.'.join(chosen.way)!r}; the file also has {also}",)


def _not_there(tree: Any, path: Path, weights: str, *, bare: bool) -> RepfuseError:
    if bare:
        return RepfuseError(f"{path} holds one network, and no choice of weights.", "", "Leave out --weights.")
    wanted = {
        "auto": "no state dict and no network under a usual name",
        "ema": "no averaged weights",
        "model": "no trained weights",
    }.get(weights, f"no network under {weights!r}")
    error = no_network(path, f"It is a dictionary with {wanted}. Its keys: {listed(tree) or 'none'}.")
    if found := list(_all_ways(tree)):
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


def _around(tree: dict[Any, Any], keys: Way) -> Around:
    """Return what stands around the network of the training checkpoint ``tree`` that ``keys`` lead to.

    Left out of it are the state of the optimizer and other copies of the weights, which no longer fit a fused network,
    and whatever is not plain data.
    """
    levels: list[dict[Any, Any]] = [tree]
    for key in keys[:-1]:
        levels.append(levels[-1][key])
    names = _names_of(levels[-1][keys[-1]])
    kept: list[dict[Any, Any]] = []
    left_out: dict[str, str] = {}
    notes: list[str] = []
    for depth, (level, taken) in enumerate(zip(levels, keys, strict=True)):
        kept.append({})
        for key, value in level.items():
            name, plain = ".".join((*keys[:depth], str(key))), Plain()
            if key == taken:
                kept[-1][key] = None  # holds the place of the network
            elif why := _stale(key, value, names):
                left_out[name] = why
            else:
                try:
                    kept[-1][key] = plain.of(value)
                except NotPlainError as error:
                    left_out[name] = f"it holds {error}, which is no plain data"
                notes += [f"{name} holds {kind}, kept as a plain dictionary" for kind in sorted(plain.changed)]
    return Around(keys, tuple(kept), left_out, tuple(notes))


def _stale(key: Any, value: Any, names: set[str]) -> str:
    if value is None:
        return ""
    if any(part in str(key).lower() for part in TRAINING):
        return STALE
    networks = list(_networks(value))
    if any(len(names & _names_of(network)) * 2 > len(names) for network in networks) or (key in KEYS and networks):
        return COPY
    return ""


def _networks(value: Any) -> Iterator[Any]:
    """Yield the networks in ``value`` and in the dictionaries that it holds, each dictionary once."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if is_network(value):
            yield value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values())


def _names_of(network: Any) -> set[str]:
    """Return the names of the weights, without those of wrappers."""
    if is_state_dict(network):
        names: Collection[str] = network
    elif isinstance(network, nn.Module):
        names = network.state_dict()
    else:
        try:
            names = state_of_record(network)
        except RecursionError:  # modules that hold each other: the reason to refuse them comes later
            names = ()
    return {without(name, SEGMENTS) for name in names}
