"""Which of the networks in a training checkpoint is meant: the averaged ones, the trained ones, or one by its key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from repfuse.checkpoint.inert import module_state

AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_model", "params_ema", "ema_state_dict")
TRAINED = ("state_dict", "model_state_dict", "model_state", "model", "module", "params", "net", "network")
KEYS = (*AVERAGED, *TRAINED)  # averaged weights first, as timm and YOLO do: they are evaluated and shipped
DEPTH = 3  # of dictionaries, to look for networks that could be named
KINDS = ("auto", "ema", "model")

Way = tuple[str, ...]


class ChosenWeights(NamedTuple):
    """``way`` are the keys to the network; ``prefix`` is what its names must begin with, and ``kind`` says which of
    several networks in one state dict is meant: ``ema``, ``model``, or ``auto``.
    """

    way: Way = ()
    prefix: str = ""
    kind: str = "auto"


BARE = ChosenWeights()


def choose(tree: dict[Any, Any], weights: str) -> ChosenWeights | None:
    """Return the network that ``weights`` asks for: ``auto``, ``ema``, ``model`` or a dotted key. None: not there."""
    if named := _named(tree, weights):
        return named
    averaged, trained = ways(tree)
    wanted = {"auto": (*averaged, *trained), "ema": averaged, "model": trained}.get(weights, ())
    if wanted:
        return ChosenWeights(wanted[0], kind="auto" if wanted[0] in averaged else weights)
    return ChosenWeights(trained[0], kind="ema") if weights == "ema" and trained else None


def ways(tree: dict[Any, Any]) -> tuple[tuple[Way, ...], tuple[Way, ...]]:
    """Return the keys to the (averaged, trained) networks under the usual names, the preferred ones first."""
    averaged, trained = _names(tree)
    return tuple(_ways(tree, averaged)), tuple(_ways(tree, trained))


def _names(tree: dict[Any, Any]) -> tuple[Way, Way]:
    """Two libraries exchange the weights when they save, so that the averaged ones are under the usual key."""
    meta = tree.get("meta")
    of_mmengine = "message_hub" in tree or (isinstance(meta, Mapping) and "mmengine_version" in meta)
    if of_mmengine and "ema_state_dict" in tree:
        return ("state_dict",), ("ema_state_dict",)
    if "current_model_state" in tree and "averaging_state" in tree:  # Lightning
        return ("state_dict",), ("current_model_state",)
    return AVERAGED, TRAINED


def _ways(tree: dict[Any, Any], names: Way) -> Iterator[Way]:
    for name in names:
        value = tree.get(name)
        if is_network(value):
            yield (name,)
        elif isinstance(value, dict):
            yield from [(name, inner) for inner in KEYS if is_network(value.get(inner))][:1]


def _named(tree: Any, key: str) -> ChosenWeights | None:
    """Return the network at a dotted key, which may go on into the names of its weights: ``state_dict.student``."""
    if is_state_dict(tree):
        prefix = f"{key}." if key else ""
        return ChosenWeights((), prefix) if any(name.startswith(prefix) for name in tree) else None
    if is_network(tree):
        return None if key else ChosenWeights(())
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


def all_ways(tree: Any, depth: int = DEPTH) -> Iterator[str]:
    """Yield the dotted keys of all networks in ``tree``, to tell the user."""
    for key, value in tree.items() if isinstance(tree, dict) and depth else ():
        if is_network(value):
            yield str(key)
        else:
            yield from (f"{key}.{inner}" for inner in all_ways(value, depth - 1))


def is_network(value: Any) -> bool:
    """Say whether ``value`` is a module (real, or a record) or a state dict."""
    return isinstance(value, nn.Module) or module_state(value) is not None or is_state_dict(value)


def is_state_dict(value: Any) -> bool:
    """Say whether ``value`` is a state dict: names to tensors, at least one."""
    return (
        isinstance(value, dict)
        and any(isinstance(held, Tensor) for held in value.values())
        and all(
            isinstance(key, str) and (isinstance(held, Tensor) or key.endswith("_extra_state"))
            for key, held in value.items()
        )
    )
