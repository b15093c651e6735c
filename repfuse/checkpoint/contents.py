"""Where in a file the network is: a module, a bare state dict, or one of these inside a training checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from repfuse.checkpoint.inert import module_state
from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from pathlib import Path

KEYS = (  # averaged weights first, as timm and YOLO do: they are the ones that are evaluated and shipped
    *("state_dict_ema", "model_ema", "ema", "params_ema", "ema_state_dict"),
    *("state_dict", "model_state_dict", "model", "module", "params", "net"),
)
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before each key
AVERAGED = "n_averaged"  # the counter that AveragedModel adds to the state dict
SHOWN = 10


@dataclass(frozen=True)
class Contents:
    """The network in a file: a ``module`` (real or a record) or a state dict, and what is around it.

    ``state`` has its keys without ``prefix``; ``extras`` are entries that belong to the wrapper. ``keys`` is the way
    to the network through the dictionaries of the training checkpoint ``container`` (empty where it is bare).
    """

    module: Any = None
    state: OrderedDict[str, Tensor] | None = None
    prefix: str = ""
    extras: dict[str, Tensor] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    container: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def find(tree: Any, path: Path, key: str | None = None) -> Contents:
    """Return the network in ``tree``; ``key`` picks one of several. Raises RepfuseError where there is none."""
    if key is None and (_is_module(tree) or _is_state_dict(tree)):
        return _contents(tree)
    if not isinstance(tree, dict):
        raise _nothing(path, f"It holds one {_kind(tree)}.")
    found = [way for way in _ways(tree, (key,) if key else KEYS) if way]
    if not found:
        names = ", ".join(str(name) for name in list(tree)[:SHOWN])
        wanted = f"nothing usable under {key!r}" if key else "no state dict and no network"
        raise _nothing(path, f"It is a dictionary with {wanted}. Its keys: {names or 'none'}.")
    return _contents(_at(tree, found[0]), found, tree)


def _contents(value: Any, ways: list[tuple[str, ...]] | None = None, container: Any = None) -> Contents:
    keys = ways[0] if ways else ()
    notes = []
    if ways and len(ways) > 1:
        others = ", ".join(repr(".".join(way)) for way in ways[1:])
        notes.append(f"took the weights under {'.'.join(keys)!r}; the file also has {others} (key=... picks one)")
    if _is_module(value):
        return Contents(module=value, keys=keys, container=container, notes=tuple(notes))
    state, prefix, extras = _unwrapped(value)
    if prefix:
        notes.append(f"took the prefix {prefix!r} off the names of the weights")
    return Contents(None, state, prefix, extras, keys, container, tuple(notes))


def _ways(tree: dict[Any, Any], keys: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the way to each network in a training checkpoint, the preferred first; dictionaries may be nested once."""
    ways: list[tuple[str, ...]] = []
    for key in keys:
        value = tree.get(key)
        if _is_module(value) or _is_state_dict(value):
            ways.append((key,))
        elif isinstance(value, dict):
            inner = (k for k in KEYS if _is_module(value.get(k)) or _is_state_dict(value.get(k)))
            ways.extend((key, k) for k in list(inner)[:1])
    return ways


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module) or module_state(value) is not None


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(key, str) and (isinstance(held, Tensor) or key.endswith("_extra_state"))
            for key, held in value.items()
        )
    )


def _unwrapped(state: dict[str, Tensor]) -> tuple[OrderedDict[str, Tensor], str, dict[str, Tensor]]:
    """Return (weights without the wrappers' prefixes, the prefix taken off, the wrappers' own entries)."""
    bare = OrderedDict(state)
    if hasattr(state, "_metadata"):
        vars(bare)["_metadata"] = OrderedDict(state._metadata)
    prefix, extras = "", {}
    while wrapper := next((w for w in WRAPPERS if all(k.startswith(w) or k == AVERAGED for k in bare)), None):
        if AVERAGED in bare:
            extras[prefix + AVERAGED] = bare.pop(AVERAGED)
        consume_prefix_in_state_dict_if_present(bare, wrapper)
        prefix += wrapper
    return bare, prefix, extras


def _at(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, Tensor) else f"object of type {getattr(value, 'origin', type(value).__name__)}"


def _nothing(path: Path, why: str) -> RepfuseError:
    hint = (
        "Give a file with a network, a state dict, or a training checkpoint that has one under 'state_dict' or 'model'."
    )
    return RepfuseError(f"{path} holds no network.", why, hint)
