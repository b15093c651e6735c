"""Where in a file the network is: a module, a bare state dict, or one of these inside a training checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from repfuse.checkpoint.around import KEYS, Around, around
from repfuse.checkpoint.inert import Record, module_state
from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from pathlib import Path

WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before each name
AVERAGED = "n_averaged"  # the counter that AveragedModel adds to the state dict
RECIPE = "repfuse"  # the attribute, or the metadata key, that holds the recipe
SHOWN = 10


@dataclass(frozen=True)
class Contents:
    """The network in a file: a ``module`` (real, or a record) or a ``state`` dict; and what is ``around`` it.

    ``recipe`` is the text that repfuse left with a state dict, ``notes`` what the user must be told.
    """

    module: Any = None
    state: OrderedDict[str, Tensor] | None = None
    recipe: Any = None
    around: Around = Around()  # noqa: RUF009 - it is frozen
    notes: tuple[str, ...] = ()


def find(tree: Any, path: Path, key: str | None = None) -> Contents:
    """Return the network in ``tree``; ``key`` picks one of several. Raises RepfuseError where there is none."""
    if key is None and (_is_network(tree) or isinstance(tree, Record)):
        return _contents(tree, {}, ())
    if not isinstance(tree, dict):
        raise no_network(path, f"It holds one object of type {type(tree).__name__}.")
    ways = _ways(tree, (key,) if key else KEYS)
    if not ways:
        wanted = f"no network under {key!r}" if key else "no state dict and no network"
        names = ", ".join(str(name) for name in list(tree)[:SHOWN])
        raise no_network(path, f"It is a dictionary with {wanted}. Its keys: {names or 'none'}.")
    notes = []
    if len(ways) > 1:
        others = ", ".join(repr(".".join(way)) for way in ways[1:])
        notes.append(f"took the weights under {'.'.join(ways[0])!r}; the file also has {others}")
    found = _contents(_at(tree, ways[0]), tree, ways[0])
    return Contents(found.module, found.state, found.recipe, found.around, (*notes, *found.notes))


def _contents(value: Any, tree: dict[str, Any], keys: tuple[str, ...]) -> Contents:
    if not isinstance(value, dict):
        return Contents(module=value, around=around(tree, keys, "", {}) if keys else Around())
    state, prefix, extras = _unwrapped(value)
    notes = (f"took the prefix {prefix!r} off the names of the weights",) if prefix else ()
    layout = around(tree, keys, prefix, extras) if keys else Around(prefix, extras)
    return Contents(None, state, getattr(value, RECIPE, None), layout, notes)


def _ways(tree: dict[Any, Any], keys: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the keys to each network, the preferred one first; a dictionary of ``tree`` may hold one in its turn."""
    ways: list[tuple[str, ...]] = []
    for key in keys:
        value = tree.get(key)
        if _is_network(value):
            ways.append((key,))
        elif isinstance(value, dict):
            ways.extend([(key, inner) for inner in KEYS if _is_network(value.get(inner))][:1])
    return ways


def _is_network(value: Any) -> bool:
    return _is_module(value) or _is_state_dict(value)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module) or module_state(value) is not None


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(isinstance(held, Tensor) for held in value.values())
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


def no_network(path: Path, why: str) -> RepfuseError:
    """Return the error for a file that loads and has nothing in it for repfuse."""
    return RepfuseError(
        f"{path} holds no network.",
        why,
        "Give a network, a state dict, or a training checkpoint that has one under 'state_dict', 'model' or the like.",
    )
