"""Real modules from inert records: the second half of loading without running code of the file.

No constructor is called: an instance is made empty and gets the attributes that the file holds. What runs is
``__setstate__`` of classes that the allow-list admits, which is code of an installed package.
"""

from __future__ import annotations

import functools
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repfuse.checkpoint.allow import (
    ACTIVATIONS,
    FUNCTIONS,
    GETATTR,
    OF_THEIR_OWN,
    PARTIAL,
    Need,
    NotAllowedError,
    names_refused,
    refusal,
    resolve,
)
from repfuse.checkpoint.inert import GlobalName, Record, is_plain_data, is_reference, origins
from repfuse.checkpoint.recognise import damaged

if TYPE_CHECKING:
    from pathlib import Path

    from repfuse.checkpoint.user_code import Named

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
        raise refusal(path, [error.need]) from error
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
            value.update(pairs)
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
            raise _refused(record.origin, "it is called, where a network holds it")
        if issubclass(cls, Enum):
            return _member(record, cls)
        return self._module(record, cls)

    def _class(self, origin: GlobalName) -> Any:
        if origin in OF_THEIR_OWN:
            raise _refused(origin, "it is used on its own")
        return self.classes[origin]

    def _module(self, record: Record, cls: type) -> nn.Module:
        if record.called or record.args or not isinstance(record.state, dict):
            raise _refused(record.origin, "it is called, where a network is restored from its attributes")
        module: nn.Module = object.__new__(cls)
        self.built[id(record)] = (record, module)  # a child may refer to its parent
        state = {self.revive(key): self.revive(value) for key, value in record.state.items()}
        _check_state(record.origin, cls, state)
        try:
            module.__setstate__(state)  # type: ignore[no-untyped-call]
        except Exception as error:  # the state comes from the file, and may be anything
            raise _refused(record.origin, f"its state does not fit: {error}") from error
        return module

    def _partial(self, record: Record) -> functools.partial[Any]:
        """Return a partial of one of torch's own layers with plain arguments, and of nothing else."""
        match record.state:
            case (made, (*args,), dict() | None as keywords, None) if is_reference(made):
                if made.origin.module.startswith("torch.nn.modules.") and is_plain_data([args, keywords]):
                    return functools.partial(self._class(made.origin), *args, **(keywords or {}))
        raise _refused(record.origin, "of something else than a layer of torch.nn with plain arguments")


def _activation(record: Record) -> Any:
    """Return a function of torch that the file spells as an attribute, and no other attribute of anything."""
    match record.args:
        case (of, str() as name) if record.called and is_reference(of) and of.origin == FUNCTIONS:
            if name in ACTIVATIONS and record.state is None:
                return getattr(torch, name)
    raise _refused(record.origin, "of something else than an activation of torch")


def _refused(origin: GlobalName, why: str) -> NotAllowedError:
    """Return the error for a record that no rule allows to be built."""
    return NotAllowedError(Need(origin, why))


def _member(record: Record, cls: type[Enum]) -> Enum:
    if record.called and len(record.args) == 1 and isinstance(record.args[0], (str, int)):
        for member in cls:
            if member.value == record.args[0]:
                return member
    raise _refused(record.origin, "it has no such member")


def _check_state(origin: GlobalName, cls: type, state: dict[Any, Any]) -> None:
    """Refuse a state that could make the class do what it was not written for.

    Attributes must not replace methods, and hooks are methods under another name. Names must be harmless in quotes:
    torch.fx writes them unescaped into the source of a traced network, and would run what stands after a quote.
    """
    for key, value in state.items():
        text = key in TEXTS and type(value) is str
        if not _is_harmless(key) or (callable(getattr(cls, key, None)) and not text):
            raise _refused(origin, f"the file replaces its {key!r}")
        if key.endswith("_hooks") and value:
            raise _refused(origin, f"the file hooks code into it: {key}")
        if key in HELD and not _is_table(value, HELD[key]):
            raise _refused(origin, f"its {key} are not what they should be")
    if not HELD.keys() <= state.keys():
        raise _refused(origin, "its state is incomplete")


def _is_table(value: object, held: type) -> bool:
    if not isinstance(value, dict):
        return False
    return all(_is_harmless(name) and (item is None or isinstance(item, held)) for name, item in value.items())


def _is_harmless(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and not set(name) & set("\"'\\.{}") and name != ""
