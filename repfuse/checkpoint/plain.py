"""Objects around a network in a file, rebuilt where they are harmless.

The rule: an object is rebuilt only where its class is in the table at the end and its state is plain, from that state
and by the class itself. Nothing is imported because a file names it, and no function of a file is called.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from repfuse.checkpoint.records import PLAIN, Record, is_reference, origin_of_dict

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
