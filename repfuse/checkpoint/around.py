"""What stands around the network in a file, and goes with it into the file that is written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from repfuse.checkpoint.choice import KEYS, is_network, is_state_dict
from repfuse.checkpoint.inert import tensors_of
from repfuse.checkpoint.metadata import NotPlainError, Plain
from repfuse.checkpoint.naming import WRAPPERS, Naming, without

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


def around_of(tree: dict[Any, Any], keys: tuple[str, ...]) -> Around:
    """Return what stands around the network of the training checkpoint ``tree`` that ``keys`` lead to.

    Left out of it are the state of the optimizer and other copies of the weights, which no longer fit a fused network,
    and whatever is not plain data.
    """
    levels: list[dict[Any, Any]] = [tree]
    for key in keys[:-1]:
        levels.append(levels[-1][key])
    names = _names(levels[-1][keys[-1]])
    around = Around(keys)
    for depth, (level, taken) in enumerate(zip(levels, keys, strict=True)):
        around = _with_level(around, level, taken, ".".join((*keys[:depth], "")), names)
    return around


def _with_level(around: Around, level: Mapping[Any, Any], taken: str, before: str, names: set[str]) -> Around:
    others: dict[Any, Any] = {}
    left_out, notes = dict(around.left_out), list(around.notes)
    for key, value in level.items():
        if key == taken:
            others[key] = None  # holds the place of the network
        elif why := _stale(key, value, names):
            left_out[f"{before}{key}"] = why
        else:
            plain = Plain()
            try:
                others[key] = plain.of(value)
            except NotPlainError as error:
                left_out[f"{before}{key}"] = f"it holds {error}, which is no plain data"
            notes += [f"{before}{key} holds {kind}, kept as a plain dictionary" for kind in sorted(plain.changed)]
    return replace(around, others=(*around.others, others), left_out=left_out, notes=tuple(notes))


def _stale(key: Any, value: Any, names: set[str]) -> str:
    if value is None:
        return ""
    if any(part in str(key).lower() for part in TRAINING):
        return STALE
    networks = list(_networks(value))
    if any(len(names & _names(network)) * 2 > len(names) for network in networks) or (key in KEYS and networks):
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


def _names(network: Any) -> set[str]:
    """Return the names of the weights, without those of wrappers."""
    if is_state_dict(network):
        names: Collection[str] = network
    elif isinstance(network, nn.Module):
        names = network.state_dict()
    else:
        try:
            names = tensors_of(network)[0]
        except RecursionError:  # modules that hold each other: the reason to refuse them comes later
            names = ()
    return {without(name, WRAPPERS) for name in names}
