"""Objects of a pickle as inert records: what the file says, with none of its code run; and what is made of them.

While a file is read, every class or function that it names, and that is not one of torch's own tensor parts, is
played by a stand-in. Making, calling or filling a stand-in only writes down that the file asks for it.

Of a record of an allowed class a real object is made without its constructor: an empty instance gets the attributes
that the file holds. What runs is ``__setstate__`` of classes that the allow-list admits, code of an installed package.

Of the objects around a network one is rebuilt only where its class is in the table at the end and its state is plain,
from that state and by the class itself. Nothing is imported because a file names it, and no function of a file is
called.
"""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from repfuse.checkpoint.allow import (
    ACTIVATIONS,
    FUNCTIONS,
    GETATTR,
    OF_THEIR_OWN,
    PARTIAL,
    GlobalName,
    NotAllowedError,
    names_refused,
    refusal,
    resolve,
)
from repfuse.checkpoint.formats import damaged
from repfuse.checkpoint.user_code import Named

ORIGIN = "origin"  # the attribute of a dictionary that plays one of another class: the name of that class
KEPT = ("_metadata", "repfuse", ORIGIN)
PLAIN = (
    *(bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter),
    *(dict, OrderedDict, Counter, list, tuple, set, torch.Size, torch.dtype, torch.device),
)


class StandIn(type):
    """The type of the stand-ins. A pickle that calls one gets what stands for the result: a record says so."""

    def __call__(cls, *args: Any) -> Any:  # noqa: D102
        made: Any = cls.__new__(cls, *args)  # type: ignore[arg-type]
        if isinstance(made, Record):
            made.called = True
        return made


class Record(metaclass=StandIn):
    """One object of the file: ``origin`` names its class (or the function called), ``args`` what that was given.

    ``called`` tells a call from a bare instance; ``state`` is what the file would restore into the object.
    """

    origin: ClassVar[GlobalName]
    args: tuple[Any, ...]
    called: bool
    state: Any

    def __new__(cls, *args: Any) -> Record:  # noqa: D102
        record = object.__new__(cls)
        record.args, record.called, record.state = args, False, None
        return record

    def __setstate__(self, state: Any) -> None:
        if self.state is not None:
            raise UnpicklingError("the file restores one object twice")
        self.state = state


class PlayedDict(metaclass=StandIn):
    """A dictionary of another library, as an OrderedDict that remembers its class: all that torch's unpickler fills.

    As data it is a dictionary, as a part of a network it is still refused, for the class is not there.
    """

    origin: ClassVar[GlobalName]

    def __new__(cls, *_args: Any) -> Any:  # noqa: D102
        played: OrderedDict[Any, Any] = OrderedDict()
        vars(played)[ORIGIN] = str(cls.origin)
        return played


def stand_in(origin: GlobalName, base: type = Record) -> type:
    """Return a new stand-in for the class or function named ``origin``."""
    return StandIn("StandIn", (base,), {"origin": origin})


def is_reference(value: object) -> bool:
    """Say whether ``value`` stands for a class or function itself, and not for an instance or a call."""
    return isinstance(value, StandIn)


def children(value: Any) -> list[Any]:
    """Return what ``value`` holds directly, where it is a container or a record."""
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, Record):
        return [*value.args, value.state]
    return []


def walk(root: Any) -> Iterator[Any]:
    """Yield ``root`` and everything inside it, each object once."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            stack.extend(children(value))


def origins(root: Any) -> set[GlobalName]:
    """Return the names of all classes and functions that ``root`` needs to become real objects."""
    values = list(walk(root))
    played = {GlobalName(*name.rpartition(".")[::2]) for value in values if (name := origin_of_dict(value))}
    return played | {value.origin for value in values if isinstance(value, Record) or is_reference(value)}


def origin_of_dict(value: object) -> str:
    """Return the name of the class that a dictionary plays; empty where it plays none."""
    origin = vars(value).get(ORIGIN) if isinstance(value, OrderedDict) else None
    return origin if isinstance(origin, str) else ""  # a file may give the attribute any value


def module_state(value: Any) -> dict[str, Any] | None:
    """Return the attributes of a record that looks like an nn.Module, or None for anything else.

    A GraphModule is pickled as a call whose first argument holds its attributes.
    """
    if not isinstance(value, Record):
        return None
    for state in (value.state, *value.args[:1]):
        if isinstance(state, dict) and isinstance(state.get("_modules"), dict):
            return state
    return None


def state_of_record(value: Any, prefix: str = "") -> OrderedDict[str, torch.Tensor]:
    """Return the state dict of a record that looks like an nn.Module, without its class; what is no table is empty."""
    found: OrderedDict[str, torch.Tensor] = OrderedDict()
    state = module_state(value) or {}
    hidden = state.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, set | list | tuple) else ()
    for kind in ("_parameters", "_buffers"):
        table = state.get(kind)
        for name, tensor in table.items() if isinstance(table, dict) else ():
            if isinstance(tensor, torch.Tensor) and name not in hidden:
                found[f"{prefix}{name}"] = tensor
    for name, child in state["_modules"].items() if state else ():
        found.update(state_of_record(child, f"{prefix}{name}."))
    return found


def tidied(root: Any) -> Any:
    """Return ``root`` without the attributes that a file can hang on its dictionaries, where they could hide methods.

    Kept are those that mean something, where they are plain data: the versions that nn.Module.state_dict notes, the
    recipe of repfuse, and the class that a dictionary plays. Raises UnpicklingError where an attribute of a tensor
    hides one of torch's own.
    """
    for value in walk(root):
        if isinstance(value, OrderedDict):
            attributes = {key: kept for key, kept in vars(value).items() if key in KEPT and is_plain_data(kept)}
            versions = attributes.get("_metadata", {})  # as nn.Module.state_dict notes them, by the path of each module
            noted = isinstance(versions, dict) and all(isinstance(path, str) for path in versions)
            if not noted or not all(isinstance(held, dict) for held in versions.values()):
                raise UnpicklingError("the file gives a state dict versions that are none")
            vars(value).clear()
            vars(value).update(attributes)
        elif isinstance(value, torch.Tensor) and any(hasattr(torch.Tensor, key) for key in vars(value)):
            raise UnpicklingError("the file gives a tensor attributes that hide methods of torch")
    return root


def is_plain_data(root: Any) -> bool:
    """Say whether ``root`` is nothing but numbers, text, tensors and the standard containers of these."""
    return all(value is None or type(value) in PLAIN for value in walk(root))


HELD = {"_parameters": nn.Parameter, "_buffers": Tensor, "_modules": nn.Module}  # what a module's tables may hold
TEXTS = {"type"}  # names of methods that libraries hide behind a text: the class of a layer, by ultralytics and YOLOv5


def revive(root: Any, path: Path, named: Named) -> Any:
    """Return ``root`` with every record replaced by the object that it describes; ``root`` itself is used up.

    Raises RepfuseError with the list of what the file needs and may not have.
    """
    names = origins(root)
    if needs := names_refused(names, named):
        raise refusal(path, needs)
    classes = {name: resolve(name, named) for name in names - OF_THEIR_OWN}
    try:
        return _Reviver(classes).revive(root)
    except NotAllowedError as error:
        raise refusal(path, [error]) from error
    except RecursionError as error:
        raise damaged(path, "its objects are nested without end") from error


class _Reviver:
    """Builds each object once, so that what was shared in the file is shared again."""

    def __init__(self, classes: dict[GlobalName, Any]) -> None:
        self.classes = classes
        self.built: dict[int, tuple[Any, Any]] = {}  # by id: the original (kept alive, so the id stays its own), result

    def revive(self, value: Any) -> Any:
        if is_reference(value):
            return self._class(value.origin)
        if not isinstance(value, (Record, dict, list, tuple, set)):
            return value
        if id(value) not in self.built:
            result = self._record(value) if isinstance(value, Record) else self._container(value)
            self.built[id(value)] = (value, result)
        return self.built[id(value)][1]

    def _container(self, value: Any) -> Any:
        self.built[id(value)] = (value, value)  # a container may hold itself
        items = [self.revive(item) for item in value]
        if isinstance(value, tuple):
            return type(value)(items)
        if isinstance(value, dict):
            pairs = list(zip(items, [self.revive(held) for held in value.values()], strict=True))
            value.clear()
            for key, held in pairs:  # the update of a Counter would count
                value[key] = held
        elif isinstance(value, list):
            value[:] = items
        else:
            value.clear()
            value.update(items)
        return value

    def _record(self, record: Record) -> Any:
        if record.origin == PARTIAL:
            return self._partial(record)
        if record.origin == GETATTR:
            return _activation(record)
        cls = self._class(record.origin)
        if not isinstance(cls, type):
            raise NotAllowedError(record.origin, "it is called, where a network holds it")
        if issubclass(cls, Enum):
            return _member(record, cls)
        return self._module(record, cls)

    def _class(self, origin: GlobalName) -> Any:
        if origin in OF_THEIR_OWN:
            raise NotAllowedError(origin, "it is used on its own")
        return self.classes[origin]

    def _module(self, record: Record, cls: type) -> nn.Module:
        if record.called or record.args or not isinstance(record.state, dict):
            raise NotAllowedError(record.origin, "it is called, where a network is restored from its attributes")
        module: nn.Module = object.__new__(cls)
        self.built[id(record)] = (record, module)  # a child may refer to its parent
        state = {self.revive(key): self.revive(value) for key, value in record.state.items()}
        _check_state(record.origin, cls, state)
        try:
            module.__setstate__(state)  # type: ignore[no-untyped-call]
        except Exception as error:  # the state comes from the file, and may be anything
            raise NotAllowedError(record.origin, f"its state does not fit: {error}") from error
        return module

    def _partial(self, record: Record) -> functools.partial[Any]:
        """Return a partial of one of torch's own layers with plain arguments, and of nothing else."""
        match record.state:
            case (made, (*args,), dict() | None as keywords, None) if is_reference(made):
                if made.origin.module.startswith("torch.nn.modules.") and is_plain_data([args, keywords]):
                    return functools.partial(self._class(made.origin), *args, **(keywords or {}))
        raise NotAllowedError(record.origin, "of something else than a layer of torch.nn with plain arguments")


def _activation(record: Record) -> Any:
    """Return a function of torch that the file spells as an attribute, and no other attribute of anything."""
    match record.args:
        case (of, str() as name) if record.called and is_reference(of) and of.origin == FUNCTIONS:
            if name in ACTIVATIONS and record.state is None:
                return getattr(torch, name)
    raise NotAllowedError(record.origin, "of something else than an activation of torch")


def _member(record: Record, cls: type[Enum]) -> Enum:
    if record.called and len(record.args) == 1 and isinstance(record.args[0], (str, int)):
        for member in cls:
            if member.value == record.args[0]:
                return member
    raise NotAllowedError(record.origin, "it has no such member")


def _check_state(origin: GlobalName, cls: type, state: dict[Any, Any]) -> None:
    """Refuse a state that could make the class do what it was not written for.

    Attributes must not replace methods, and hooks are methods under another name. Names must be harmless in quotes:
    torch.fx writes them unescaped into the source of a traced network, and would run what stands after a quote.
    """
    for key, value in state.items():
        text = key in TEXTS and type(value) is str
        if not _is_harmless(key) or (callable(getattr(cls, key, None)) and not text):
            raise NotAllowedError(origin, f"the file replaces its {key!r}")
        if key.endswith("_hooks") and value:
            raise NotAllowedError(origin, f"the file hooks code into it: {key}")
        if key in HELD:
            fits = isinstance(value, dict) and all(x is None or isinstance(x, HELD[key]) for x in value.values())
            if not fits or not all(map(_is_harmless, value)):
                raise NotAllowedError(origin, f"its {key} are not what they should be")
    if not HELD.keys() <= state.keys():
        raise NotAllowedError(origin, "its state is incomplete")


def _is_harmless(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and not set(name) & set("\"'\\.{}") and name != ""


# What is around a network, rebuilt where it is harmless.


HARMLESS = (np.ndarray, np.generic, np.dtype, PurePath)  # where a trusted file gave them already
NUMBERS = re.compile(r"[biufc]\d{1,2}|[US]\d+")  # dtypes whose values are bytes and no objects


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
        dtype = getattr(value, "dtype", value)
        holds_objects = isinstance(dtype, np.dtype) and dtype.hasobject
        if value is None or type(value) in PLAIN or (isinstance(value, HARMLESS) and not holds_objects):
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
    return np.frombuffer(content, dtype, count=1)[0]


def _array(_record: Record, _args: list[Any], state: Any) -> Any:
    _version, shape, dtype, by_columns, content = state
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C").copy(order="A")


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_ARRAYS = {"scalar": _scalar, "_reconstruct": _array}
_MAKERS: dict[str, Callable[[Record, list[Any], Any], Any]] = {
    "argparse.Namespace": lambda _record, args, state: Namespace(*args, **(state or {})),
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    "numpy.dtype": _dtype,
    **{f"{core}.multiarray.{name}": make for core in ("numpy.core", "numpy._core") for name, make in _ARRAYS.items()},
}
