"""Objects of a pickle as inert data: what the file says, with none of its code run.

While a file is read, every class or function that it names, and that is not one of torch's own tensor parts, is
played by a stand-in. Making, calling or filling a stand-in only writes down that the file asks for it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ORIGIN = "origin"  # the attribute of a dictionary that plays one of another class: the name of that class
KEPT = ("_metadata", "repfuse", ORIGIN)
PLAIN = (
    *(bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter),
    *(dict, OrderedDict, Counter, list, tuple, set, torch.Size, torch.dtype, torch.device),
)


class GlobalName(NamedTuple):
    """A class or function as a pickle names it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def package(self) -> str:
        """The top-level package: ``timm`` of ``timm.models.byobnet``."""
        return self.module.partition(".")[0]


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


def tensors_of_record(value: Any, prefix: str = "") -> tuple[OrderedDict[str, torch.Tensor], set[str]]:
    """Return the parameters and buffers of a record that looks like an nn.Module, by name, without its class.

    Also returns which of them are non-persistent, and so no part of its state dict.
    """
    found: OrderedDict[str, torch.Tensor] = OrderedDict()
    state = module_state(value) or {}
    hidden = {f"{prefix}{name}" for name in state.get("_non_persistent_buffers_set") or ()}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (state.get(kind) or {}).items():
            if isinstance(tensor, torch.Tensor):
                found[f"{prefix}{name}"] = tensor
    for name, child in state["_modules"].items() if state else ():
        inner, inner_hidden = tensors_of_record(child, f"{prefix}{name}.")
        found.update(inner)
        hidden |= inner_hidden
    return found, hidden


def tidied(root: Any) -> Any:
    """Return ``root`` without the attributes that a file can hang on its dictionaries, where they could hide methods.

    Kept are those that mean something, where they are plain data: the versions that nn.Module.state_dict notes, the
    recipe of repfuse, and the class that a dictionary plays. Raises UnpicklingError where an attribute of a tensor
    hides one of torch's own.
    """
    for value in walk(root):
        if isinstance(value, OrderedDict):
            attributes = {key: kept for key, kept in vars(value).items() if key in KEPT and is_plain_data(kept)}
            if not _are_versions(attributes.get("_metadata", {})):
                raise UnpicklingError("the file gives a state dict versions that are none")
            vars(value).clear()
            vars(value).update(attributes)
        elif isinstance(value, torch.Tensor) and any(hasattr(torch.Tensor, key) for key in vars(value)):
            raise UnpicklingError("the file gives a tensor attributes that hide methods of torch")
    return root


def _are_versions(value: Any) -> bool:
    """Say whether ``value`` is what nn.Module.state_dict notes: by the path of each module, a dictionary."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, dict) for k, v in value.items())


def is_plain_data(root: Any) -> bool:
    """Say whether ``root`` is nothing but numbers, text, tensors and the standard containers of these."""
    return all(value is None or type(value) in PLAIN for value in walk(root))
