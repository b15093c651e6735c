"""The arguments of one call: as they are, as plain data that makes others like them, in other sizes."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Arguments:
    """What a network is given in one call, by position."""

    args: tuple[Any, ...]

    def distinct(self) -> Arguments:
        """Return the arguments with a copy of each tensor that is there a second time: it might be another one."""
        seen: set[int] = set()

        def copied(x: Tensor) -> Tensor:
            again = id(x) in seen
            seen.add(id(x))
            return x.clone() if again else x

        return self.changed(copied)

    def copied(self) -> Arguments:
        """Return copies of the arguments, a tensor that is there twice once."""
        memo: dict[int, Tensor] = {}
        return self.changed(lambda x: memo.setdefault(id(x), x.clone()))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """Return the arguments with others in the place of the tensors."""
        if all(type(x) is Tensor for x in self.args):  # nothing to look into, as for most networks
            return Arguments(tuple(map(change, self.args)))
        return Arguments(tree_map_only(Tensor, change, self.args))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, and in them."""
        return [x for x in tree_leaves(self.args) if isinstance(x, Tensor)]

    @property
    def numbers(self) -> int:
        """How many numbers the tensors hold."""
        return sum(x.numel() for x in self.tensors)

    def names(self, parameters: Iterable[inspect.Parameter]) -> list[str]:
        """Return what a forward of these parameters calls its positional arguments. Raises TypeError where they do not
        fit.
        """
        names: list[str] = []
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}_{number}" for number in range(len(self.args) - len(names))]
            elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
        if len(names) < len(self.args):
            raise TypeError(f"forward takes {len(names)} arguments, and was given {len(self.args)}")
        return names[: len(self.args)]


def description(value: Any) -> Any:
    """Return what ``describe`` returns, and None where it raises ValueError."""
    try:
        return describe(value)
    except ValueError:
        return None


def describe(value: Any) -> Any:
    """Return a value as JSON-ready data, tensors by shape and dtype. Raises ValueError for anything else."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(item) for key, item in value.items()}}
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no such numbers
    if type(value) in _PLAIN:
        return {"value": value}
    raise ValueError(f"a {type(value).__name__} is neither a tensor nor plain data")


def recreate(description: Any, like: Tensor, fill: Callable[[Tensor], object] = Tensor.zero_) -> Any:
    """Return a value that ``describe`` described: tensors on the device of ``like``, floats in its dtype, and these as
    ``fill`` fills them; the others are zeros.

    Raises KeyError, TypeError, AttributeError or ValueError where the description is none.
    """
    match description:
        case {"shape": shape, "dtype": dtype}:
            kind = getattr(torch, dtype)
            made = torch.zeros(shape, dtype=like.dtype if kind.is_floating_point else kind, device=like.device)
            if kind.is_floating_point:
                fill(made)
            return made
        case {"list": items}:
            return [recreate(item, like, fill) for item in items]
        case {"tuple": items}:
            return tuple(recreate(item, like, fill) for item in items)
        case {"dict": items}:
            return {key: recreate(item, like, fill) for key, item in items.items()}
        case {"float": name}:
            return float(name)
        case {"value": value}:
            return value
    raise ValueError(f"{description!r} describes no argument")


# Arguments like the example's in other sizes: which axes are free is found by trying. Every axis of every tensor may be
# one: batch, space, tokens. Axes of different tensors that have the same place and the same size are taken for the same
# axis. At one time some are larger than in the example and others smaller, so that no run is much work, and at another
# time the other way round.

Axis = tuple[int, int]
"""Which axis, and its size in the example."""

Try = Callable[[Arguments, bool], bool]
"""Runs the network on these arguments; says whether it takes them. What is not needed may be left out as too much."""


@dataclass(frozen=True)
class _Step:
    """How an axis is made larger, and smaller."""

    larger: Callable[[int], int]
    smaller: Callable[[int], int]


_LITTLE, _MUCH = 1 << 12, 1 << 17
"""As many numbers as an input may have to be made a thousand longer, and may then have."""

_FAR = _Step(lambda n: n + 1029, lambda n: max(1, n // 3 + 1 - n // 3 % 2))
"""Beyond what code compares sizes with, where that is little work."""

_DOUBLE = _Step(lambda n: 2 * n, lambda n: max(1, n // 2))

_STEPS = (
    _Step(lambda n: n + 5, lambda n: max(1, n // 3 + 1 - n // 3 % 2)),
    _Step(lambda n: (n // 32 + 1) * 64, lambda n: max(1, n // 64) * 32),
    _DOUBLE,
    _Step(lambda n: n + 1, lambda n: max(1, n - 1)),
)
"""Odd sizes for even ones and even for odd, multiples of 32, simple ratios, and the nearest."""

_BY_TWO = _Step(lambda n: n + 2, lambda n: max(1, n - 2))
"""For networks that take odd sizes alone, or even ones."""

_FEW = (3, 4, 6, 8)
"""How much larger: for networks that take some sizes alone, such as those that a stride leaves odd."""


def try_other_sizes(arguments: Arguments, attempt: Try, *, thoroughly: bool, cuts: Callable[[], bool]) -> None:
    """Try the network at other sizes than those of the example, so that each axis that is free takes others: both
    larger and smaller ones if ``thoroughly``, and the smallest where it ``cuts`` values to a length.
    """
    leaves = arguments.tensors
    axes = list(dict.fromkeys((axis, n) for x in leaves for axis, n in enumerate(x.shape)))
    fixed, taken = list[Axis](), list[Mapping[Axis, int]]()
    for fixed in _for_channels(axes):
        likely = [axis for axis in axes if axis not in fixed]
        if taken := _together(arguments, likely, attempt, thoroughly) if likely else []:
            break
    else:
        fixed = []
    unmoved = [axis for axis in axes if axis not in fixed and all(sizes[axis] == axis[1] for sizes in taken)]
    small, moved = _one_by_one(arguments, unmoved, attempt, taken[-1] if taken else {})
    _alike(arguments, [axis for axis in unmoved if axis not in moved], attempt)
    if thoroughly:
        free = (axis for axis in axes if axis[0] > 0 and axis not in fixed)
        reached = {axis: {sizes[axis] for sizes in taken} | moved.get(axis, set()) for axis in free}
        _further(arguments, reached, attempt, small)
        if cuts():
            _at_the_ends(arguments, list(reached), attempt)
    for axis in fixed:
        for n in (axis[1] + 1, max(1, axis[1] - 1)):
            if not attempt(_resized(arguments, {**small, axis: n}), True):
                break
    if len(leaves) > 1:
        _each_alone(arguments, leaves, attempt)


def _each_alone(arguments: Arguments, leaves: Sequence[Tensor], attempt: Try) -> None:
    """Try the axes of each tensor by themselves: that two have the same size may be by chance."""
    for x in leaves:
        for axis, n in enumerate(x.shape):
            if axis and any(y is not x and y.shape[axis : axis + 1] == (n,) for y in leaves):
                attempt(_resized(arguments, {(axis, n): n + 1}, only=x), True)


def other_ranks(arguments: Arguments, is_open: Callable[[], bool]) -> Iterator[Arguments]:
    """Yield arguments without the first axis, and with one more; then with fewer and fewer, as long as it ``is_open``
    how forwards that ask for their number decide.
    """
    tensors = arguments.tensors
    ranks = [x.dim() for x in tensors]
    if max(ranks, default=0) > 1 and all(x.shape[0] for x in tensors if x.dim() > 1):
        yield arguments.changed(partial(_first, 1))
    if ranks and max(ranks) < 4:
        yield arguments.changed(lambda x: x[None] if x.layout in _DIVISIBLE else x)
    for axes in range(2, max(ranks, default=0)):
        if all(0 not in x.shape for x in tensors) and is_open():
            yield arguments.changed(partial(_first, axes))


def _first(axes: int, x: Tensor) -> Tensor:
    """Return what is first along so many axes, of which one is left."""
    return x[(0,) * max(0, min(axes, x.dim() - 1))] if x.layout in _DIVISIBLE else x


_DIVISIBLE = (torch.strided, torch.sparse_coo)
"""Layouts of tensors of which torch takes parts."""


def _for_channels(axes: list[Axis]) -> list[list[Axis]]:
    """Return the axes where networks may have their channels, which the weights fix, each reading that there is.

    Channels come first in images, and first or last in signals, tokens and features.
    """
    rank = max((axis for axis, _ in axes), default=0) + 1
    readings = [1] if rank > 3 else [rank - 1, 1] if rank == 3 else [rank - 1]
    return [[axis for axis in axes if axis[0] == reading and reading > 0] for reading in readings]


def _together(arguments: Arguments, axes: list[Axis], attempt: Try, thoroughly: bool) -> list[Mapping[Axis, int]]:
    """Try all axes at once, once or twice; return the sizes that the network takes."""
    far = (_FAR,) if arguments.numbers < _LITTLE else ()
    for step in (*far, *_STEPS[:2]):
        took: list[Mapping[Axis, int]] = []
        for sizes in (_sizes(axes, step, 1), _sizes(axes, step, 0)):
            if not took or thoroughly:
                others = _resized(arguments, sizes)
                if (step is not _FAR or others.numbers <= _MUCH) and attempt(others, True):
                    took.append(sizes)
        if took:
            return took
    return []


def _alike(arguments: Arguments, axes: list[Axis], attempt: Try) -> None:
    """Try the axes that have the same size in the same way, larger and smaller: for networks of squares alone."""
    counts = Counter(n for axis, n in axes if axis > 0)
    several = [axis for axis in axes if axis[0] > 0 and counts[axis[1]] > 1]
    for changes in (_GROWN, [step.smaller for step in _STEPS]) if several else ():
        sizes = ({axis: change(axis[1]) for axis in several} for change in changes)
        any(attempt(_resized(arguments, each), True) for each in sizes)


_GROWN: tuple[Callable[[int], int], ...] = (
    *(lambda n: n + 5, lambda n: n + 1),
    *(lambda n: (n // 32 + 1) * 32, lambda n: 2 * n),
)
"""Along several axes at once: by little, for the work grows as the product."""


def _further(
    arguments: Arguments, reached: Mapping[Axis, Collection[int]], attempt: Try, others: Mapping[Axis, int]
) -> None:
    """Try axes that ``reached`` only sizes near the example's at one further away: behind a stride of 4, what is as
    large for 9 pixels as for 12 has not moved.
    """
    for axis, sizes in reached.items():
        n = axis[1]
        if any(size != n for size in sizes) and all(n < 2 * size < 4 * n for size in sizes):
            far = dict.fromkeys((max(1, n // 2), n + n // 2, *(n + more for more in _MORE)))
            any(attempt(_resized(arguments, {**others, axis: size}), False) for size in far if size not in sizes)


def _at_the_ends(arguments: Arguments, axes: Sequence[Axis], attempt: Try) -> None:
    """Try these axes as small as the network takes them, and then each far larger: what is cut to 60 of 75 pixels and
    of 224 may be all of 40; what is cut from the 200th pixel on may be nothing.
    """
    for n in _TINY:
        smallest = {axis: min(n, axis[1]) for axis in axes}
        if attempt(_resized(arguments, smallest), True):
            for axis in axes:
                attempt(_resized(arguments, {**smallest, axis: _FAR.larger(axis[1])}), True)
            return


_TINY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

_MORE = (64, 48, 32, 24, 20, 16, 14, 12, 10, 8, 6, 4, 3)
"""So that of the networks that take every so many sizes in a row, by strides and windows, most take one."""


def _sizes(axes: list[Axis], step: _Step, first: int) -> dict[Axis, int]:
    """Return sizes for all axes: every second one larger, from the ``first`` on, and the others smaller.

    What goes far goes there along one axis alone.
    """
    larger = axes[first::2]
    spatial = next((axis for axis in larger if axis[0] > 0), None)
    sizes = {}
    for axis in axes:
        where, n = axis
        if where == 0:
            sizes[axis] = max(1, n - 1) if axis in larger else n + 1
        elif axis in larger:
            sizes[axis] = (step if axis == spatial else _STEPS[0]).larger(n) if step is _FAR else step.larger(n)
        else:
            sizes[axis] = step.smaller(n)
    return sizes


def _one_by_one(
    arguments: Arguments, axes: list[Axis], attempt: Try, taken: Mapping[Axis, int]
) -> tuple[Mapping[Axis, int], dict[Axis, set[int]]]:
    """Try each axis smaller, and then larger, the others as they were ``taken`` or as small; return these sizes, and
    of the axes that took others which.

    Of an axis that takes no other size but the example's, 1 is tried: that may be broadcast.
    """
    small, moved = dict(taken), dict[Axis, set[int]]()

    def first(axis: Axis, sizes: Iterable[int], *, needed: bool) -> int | None:
        tried = (n for n in dict.fromkeys(sizes) if n != axis[1])
        found = next((n for n in tried if attempt(_resized(arguments, {**small, axis: n}), needed)), None)
        if found is not None:
            moved.setdefault(axis, set()).add(found)
        return found

    for axis in axes:
        steps = _STEPS[-1:] if axis[0] == 0 else (*_STEPS[::-1], _BY_TWO)
        found = first(axis, (step.smaller(axis[1]) for step in steps), needed=False)
        if found is None:
            first(axis, (1,), needed=True)
        else:
            small[axis] = found
    for axis in axes:  # twice the size first: what a network divides it by, h // 7, may go once into all others
        larger = [step.larger(axis[1]) for step in (_DOUBLE, *_STEPS[::-1], _BY_TWO)]
        if axis in small:  # else it may be of one size
            larger += [axis[1] + few for few in _FEW]
        first(axis, larger, needed=True)
    return small, moved


def _resized(arguments: Arguments, sizes: Mapping[Axis, int], only: Tensor | None = None) -> Arguments:
    def resized(x: Tensor) -> Tensor:
        if (only is not None and x is not only) or x.layout not in _DIVISIBLE:
            return x
        grows = {axis: sizes.get((axis, n), n) > n for axis, n in enumerate(x.shape)}
        for axis in sorted(grows, key=grows.__getitem__):  # first what is cut away
            n = x.shape[axis]
            wanted = sizes.get((axis, n), n)
            if wanted != n and n == 0:  # nothing there to repeat
                x = x.new_zeros((*x.shape[:axis], wanted, *x.shape[axis + 1 :]))
            elif wanted < n and x.layout is torch.strided:
                x = x.narrow(axis, 0, wanted)
            elif wanted != n:
                x = x.index_select(axis, torch.arange(wanted, device=x.device) % n)
        return x

    return arguments.changed(resized)
