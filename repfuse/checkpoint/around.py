"""What stands around the network in a file, and goes with it into the file that is written.

A few harmless kinds of object are rebuilt, all others are named. The rule: an object is rebuilt only where its class is
in the table at the end and its state is plain, from that state and by the class itself. Nothing is imported because a
file names it, and no function of a file is called.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from torch import nn

from repfuse.checkpoint.choice import KEYS, is_network, is_state_dict
from repfuse.checkpoint.fitting import WRAPPERS, Naming, without
from repfuse.checkpoint.inert import PLAIN, Record, is_reference, origin_of_dict, tensors_of_record

TRAINING = ("optim", "scaler", "scaling", "scheduler")  # parts of the keys of training state
STALE = "it belongs to the training and no longer fits"
COPY = "another copy of the weights"
ASKED = "as --drop-metadata asks"
HARMLESS = (np.ndarray, np.generic, np.dtype, PurePath)  # where a trusted file gave them already
NUMBERS = re.compile(r"[biufc]\d{1,2}|[US]\d+")  # dtypes whose values are bytes and no objects


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
            names = tensors_of_record(network)[0]
        except RecursionError:  # modules that hold each other: the reason to refuse them comes later
            names = ()
    return {without(name, WRAPPERS) for name in names}


class NotPlainError(Exception):
    """Carries what is no plain data, in words."""


class Plain:
    """Rebuilds values, each object once; ``changed`` are the classes of dictionaries that became plain ones."""

    def __init__(self) -> None:
        self.changed: set[str] = set()
        self.built: dict[int, tuple[Any, Any]] = {}  # by id: the original (kept alive, so the id stays its own), result

    def of(self, value: Any) -> Any:
        """Return ``value`` as plain data. Raises NotPlainError where it is none."""
        if id(value) in self.built:
            return self.built[id(value)][1]
        try:
            result = self._rebuilt(value)
        except RecursionError as error:  # a container that holds itself too
            raise NotPlainError("containers nested without end") from error
        except TypeError as error:  # what is no plain data does not hash either
            raise NotPlainError("a container with odd keys") from error
        self.built[id(value)] = (value, result)
        return result

    def _rebuilt(self, value: Any) -> Any:
        if isinstance(value, Record):
            return self._object(value)
        if type(value) in (dict, OrderedDict, Counter):
            return self._dict(value)
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.of(item) for item in value)
        if type(value) is Namespace:
            return Namespace(**{str(key): self.of(held) for key, held in vars(value).items()})
        if value is None or type(value) in PLAIN or (isinstance(value, HARMLESS) and not _holds_objects(value)):
            return value
        if is_reference(value):
            raise NotPlainError(f"the class or function {value.origin}")
        raise NotPlainError(f"an object of {type(value).__module__}.{type(value).__qualname__}")

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        held = {self.of(key): self.of(item) for key, item in value.items()}
        if origin := origin_of_dict(value):
            self.changed.add(origin)
            return held
        same = type(value)(held)
        if isinstance(value, OrderedDict):
            vars(same).update({key: self.of(item) for key, item in vars(value).items()})
        return same

    def _object(self, record: Record) -> Any:
        make = _MAKERS.get(str(record.origin))
        if make is not None:
            try:
                args = [arg if is_reference(arg) else self.of(arg) for arg in record.args]
                return make(record, args, self.of(record.state))
            except NotPlainError:
                raise
            except Exception:  # where its state is not what that class writes, that may fail in any way
                pass
        raise NotPlainError(f"an object of {record.origin}")


def _namespace(_record: Record, args: list[Any], state: Any) -> Any:
    return Namespace(*args, **(state or {}))


def _path(record: Record, args: list[Any], _state: Any) -> Any:
    """Return a path in its pure form, which names the same and opens nothing."""
    if not record.called or not all(isinstance(part, str) for part in args):
        raise ValueError("no parts of a path")
    return (PureWindowsPath if "Windows" in record.origin.name else PurePosixPath)(*args)


def _dtype(_record: Record, args: list[Any], state: Any) -> Any:
    if not isinstance(args[0], str) or not NUMBERS.fullmatch(args[0]):
        raise ValueError("a dtype of objects")
    order: Any = state[1] if state else "="
    return np.dtype(args[0]).newbyteorder("=" if order == "|" else order)


def _scalar(_record: Record, args: list[Any], _state: Any) -> Any:
    dtype, content = args
    return np.frombuffer(_bytes(content), dtype, count=1)[0]


def _array(_record: Record, _args: list[Any], state: Any) -> Any:
    _version, shape, dtype, by_columns, content = state
    return np.frombuffer(_bytes(content), dtype).reshape(shape, order="F" if by_columns else "C").copy(order="A")


def _bytes(content: Any) -> bytes | bytearray:
    if not isinstance(content, (bytes, bytearray)):
        raise TypeError("no bytes")
    return content


def _holds_objects(value: Any) -> bool:
    dtype: Any = value.dtype if isinstance(value, np.ndarray) else value
    return isinstance(dtype, np.dtype) and dtype.hasobject


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_ARRAYS = {"scalar": _scalar, "_reconstruct": _array}
_MAKERS: dict[str, Callable[[Record, list[Any], Any], Any]] = {
    "argparse.Namespace": _namespace,
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    "numpy.dtype": _dtype,
    **{f"{core}.multiarray.{name}": make for core in ("numpy.core", "numpy._core") for name, make in _ARRAYS.items()},
}
