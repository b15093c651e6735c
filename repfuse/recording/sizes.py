"""Sizes as forward code gets them: ints that know where they come from, and note when somebody decides by them.

``x.shape[2] * 2`` in a recording is that product and not a number; ``if h > 256`` gives itself away at any size.
torch takes such ints wherever it takes ints. What leaves them behind, ``int(h)`` or ``h / 2``, is noted, too: from then
on the forward computes with numbers of which nothing more can be seen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

Origin = tuple[Any, ...]
"""A function and its operands, some of which may be sizes, too: ``(operator.mul, h, 2)``; or, for a size of a tensor,
``(SIZE, node, axis)``, and for the number of its axes, ``(RANK, node)``."""

SIZE, RANK = "size", "dim"
PIECES = "pieces"  # of how many a tensor is cut into


class Sizes(tuple[Any, ...]):
    """A torch.Size, with nodes in the place of its numbers, for which it has no room."""

    __slots__ = ()


class Decision(NamedTuple):
    """Forward code asked ``question`` of a size that was computed from ``sizes``, beside ``others``.

    ``outcome`` is the answer that it can branch on; None where that is not known: a key of a dict, a text. Where it
    ``leaves``, it made a plain number of the size.
    """

    question: str
    sizes: tuple[Any, ...]
    others: tuple[Any, ...] = ()
    outcome: bool | None = None
    of_rank: bool = False
    leaves: bool = False


Note = Callable[[Decision], None]


class Dimension(int):
    """A size, with its ``origin``; ``note`` is told of each decision."""

    origin: Origin
    note: Note

    def __new__(cls, value: int, origin: Origin, note: Note) -> Dimension:
        """Return the size ``value``."""
        made = super().__new__(cls, value)
        made.origin, made.note = origin, note
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of tensors that it is computed from."""
        if isinstance(self.origin[0], str):
            return (int.__int__(self),)
        return tuple(size for part in self.origin[1:] if type(part) is Dimension for size in part.sizes)

    @property
    def is_rank(self) -> bool:
        """Whether it is the number of axes of a tensor, or computed from one alone."""
        return bool(self.origin[0] == RANK)


def _computed(name: str, function: Callable[..., Any], swapped: bool) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Dimension, *others: Any) -> Any:
        result = plain(self, *others)
        if type(result) is not int:  # with a float, which is no size any more
            self.note(Decision(name, self.sizes, _known(others), None, self.is_rank, leaves=True))
            return result
        operands = (*others, self) if swapped else (self, *others)
        return Dimension(result, (function, *operands), self.note)

    return method


def _decided(name: str, *, answers: bool) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Dimension, *others: Any) -> Any:
        result = plain(self, *others)
        if result is NotImplemented and others and isinstance(others[0], float):
            result = getattr(float, name)(float(int.__int__(self)), *others)
        if result is not NotImplemented:
            outcome = bool(result) if answers else None
            self.note(Decision(name, self.sizes, _known(others), outcome, self.is_rank))
        return result

    return method


def _left(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Dimension, *others: Any, **named: Any) -> Any:
        self.note(Decision(name, self.sizes, _known(others), None, self.is_rank, leaves=True))
        return plain(self, *others, **named)

    return method


def _known(others: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.sizes if type(x) is Dimension else x if isinstance(x, int | float | str) else str(x) for x in others)


for _function in (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod):
    _name = _function.__name__
    setattr(Dimension, f"__{_name}__", _computed(f"__{_name}__", _function, swapped=False))
    setattr(Dimension, f"__r{_name}__", _computed(f"__r{_name}__", _function, swapped=True))
Dimension.__neg__ = _computed("__neg__", operator.neg, swapped=False)  # type: ignore[method-assign]
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "bool"):
    setattr(Dimension, f"__{_name}__", _decided(f"__{_name}__", answers=True))
for _name in ("hash", "str", "repr", "format"):
    setattr(Dimension, f"__{_name}__", _decided(f"__{_name}__", answers=False))
for _name in ("truediv", "pow", "lshift", "rshift", "and", "or", "xor"):
    for _side in ("", "r"):
        setattr(Dimension, f"__{_side}{_name}__", _left(f"__{_side}{_name}__"))
for _name in ("int", "float", "round", "ceil", "floor", "trunc", "index", "invert"):
    setattr(Dimension, f"__{_name}__", _left(f"__{_name}__"))
for _name in ("bit_length", "bit_count", "to_bytes", "as_integer_ratio"):
    setattr(Dimension, _name, _left(_name))
Dimension.__abs__ = Dimension.__pos__ = Dimension.conjugate = lambda self: self  # type: ignore[method-assign]
Dimension.real = Dimension.numerator = property(lambda self: self)  # type: ignore[assignment,method-assign]
