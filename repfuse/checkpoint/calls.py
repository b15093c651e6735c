"""The objects of a pickle that is followed without being run, and which calls may make them.

The rule: of torch's own parts only those that restore a tensor are called, and with what torch itself writes. What
lies outside of torch becomes an inert record, whatever it is called with.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from repfuse.checkpoint.inert import GlobalName

if TYPE_CHECKING:
    from collections.abc import Iterable

REBUILD = ("parameter", "parameter_with_state", "tensor", "tensor_v2", "tensor_v3", "qtensor", "sparse_tensor")
TYPED = GlobalName("torch._tensor", "_rebuild_from_type_v2")  # calls the function that it is given
CALLED = {  # what torch writes calls of
    *(GlobalName("torch._utils", f"_rebuild_{kind}") for kind in (*REBUILD, "meta_tensor_no_storage")),
    *(GlobalName("torch.serialization", "_get_layout"), GlobalName("torch.nn.parameter", "Parameter")),
    *(GlobalName("torch", "Size"), GlobalName("torch", "device")),
}
OWN = (  # modules of which torch's unpickler calls more
    *("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.serialization", "torch.nn.parameter"),
    *("torch.cuda", "torch.sparse", "torch.cuda.sparse"),
)
ENCODE, BYTEARRAY = GlobalName("_codecs", "encode"), GlobalName("builtins", "bytearray")
HARMLESS = CALLED | {TYPED, ENCODE, BYTEARRAY, GlobalName("builtins", "set"), GlobalName("builtins", "complex")}
ENOUGH = 1 << 40  # no weight is counted beyond this


class VettingError(UnpicklingError):
    """Says which rule a pickle breaks."""


class Value:
    """One object on the stack: its items where it is a tuple (else None), and how many objects it holds in all."""

    __slots__ = ("items", "weight")

    def __init__(self, items: Iterable[Any] | None = None) -> None:
        self.items = None if items is None else tuple(items)
        self.weight = min(ENOUGH, 1 + sum(map(weight_of, self.items or ())))


def weight_of(value: Any) -> int:
    """Return how many objects a value on the stack is."""
    return value.weight if isinstance(value, Value) else 1


def check_call(function: Any, arguments: Any) -> None:
    """Raise VettingError where a call, of what is on the stack, does more than restore data."""
    if not isinstance(function, GlobalName):
        raise VettingError("it calls something that it does not name")
    known = arguments.items if isinstance(arguments, Value) else None
    if function in (ENCODE, BYTEARRAY):
        _check_bytes(function, known)
    elif function == TYPED:
        _check_typed(known)
    elif function not in CALLED and function.module in OWN:
        raise VettingError(f"it calls {function}, which restores no data")


def _check_bytes(function: GlobalName, arguments: tuple[Any, ...] | None) -> None:
    """Allow what a pickle of bytes is at protocol 2: text and the encoding that takes every character for a byte."""
    match arguments:
        case (str(), "latin1" | "latin-1"):
            return
        case () if function == BYTEARRAY:
            return
    raise VettingError(f"it calls {function} with something else than text in latin1")


def _check_typed(arguments: tuple[Any, ...] | None) -> None:
    match arguments:
        case (GlobalName() as function, _, Value(items=tuple()) as inner, _) if function in CALLED:
            return check_call(function, inner)
    raise VettingError(f"it calls {TYPED} as torch does not")
