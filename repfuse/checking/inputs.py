"""The trials around an example, by effort: inputs like it, with other values, batches and sizes.

The network says nowhere which axes are spatial. Channels come first in most networks (``[B, C, H, W]``), last in some
and in sequences of tokens (``[B, N, C]``): both readings are tried, and the network refuses the wrong one.

The kinds of input, each for the mistakes that it brings out:

- ``noise``: every weight takes part, so a wrong one shows, however diluted by the others.
- ``large``: wakes units that biases keep silent, and brings weights out against biases.
- ``nearly constant``: far from the border all is even, as in large parts of a photograph, so what cancels in noise adds
  up: wrong padding values and wrong sums of a kernel stand out.
- ``impulses``: single pixels show a kernel tap by tap: one that is shifted, or lost its dilation; one pixel for each
  phase of a stride of two, for a stride that starts elsewhere; in the corners, for a crop or padding at one end alone.
- ``frame``: only the border is not zero, so what is wrong there is not diluted by the interior.

Nothing is exactly zero or constant. On exact zeros and constants, kernels whose weights sum to 0 leave nothing but
rounding, to which every error is relative, and scores tie, so that the rounding decides which comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, reduce
from operator import and_, or_
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from repfuse.errors import RepfuseError

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """One set of inputs for a call of both networks, and what to call it in a report.

    ``sampled`` says whether the effect of rounding is measured on it in any case, which takes several runs of each
    network; elsewhere it borrows. ``otherwise`` makes what to try in its place, in this order, where the original
    refuses it (see ``repfuse.checking.comparison``).
    """

    label: str
    inputs: tuple[Any, ...]
    sampled: bool = True
    otherwise: Callable[[], Iterable[Trial]] = tuple

    @property
    def shapes(self) -> tuple[Sizes, ...]:
        """The shape of each tensor input."""
        return tuple(tuple(x.shape) for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor))

    @property
    def work(self) -> int:
        """How much a network has to do on it, roughly: the number of elements of its tensors."""
        return sum(x.numel() for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor))


def mapped(trial: Trial, change: Callable[[tuple[Any, ...]], Any]) -> Trial:
    """Return the trial with changed inputs, also of what may take its place."""
    others = trial.otherwise
    return replace(
        trial, inputs=tuple(change(trial.inputs)), otherwise=lambda: (mapped(other, change) for other in others())
    )


def rounded_through(trial: Trial, dtype: torch.dtype | None) -> Trial:
    """Return the trial with floating inputs that both their own dtype and ``dtype`` hold exactly."""
    if dtype is None:
        return trial
    return mapped(trial, lambda inputs: tree_map(lambda x: x.to(dtype).to(x.dtype) if is_floating(x) else x, inputs))


def is_floating(x: Any) -> bool:
    """Whether ``x`` is a tensor of floating numbers."""
    return isinstance(x, torch.Tensor) and x.is_floating_point()


class Effort(StrEnum):
    """How many inputs are tried, and how large ones."""

    QUICK = "quick"
    """The example, and a few inputs of up to an eighth of its size, or longer along an axis: seconds."""

    DEFAULT = "default"
    """The example, every kind of input at about a quarter of its size, and small sizes, odd and even."""

    THOROUGH = "thorough"
    """More random inputs, every kind at three sizes, larger batches, and 32 sizes in a row: each phase of a stride."""


@dataclass(frozen=True)
class Scope:
    """What an effort comes to; the default one, where nothing else is said.

    ``parts`` are the divisors of the example's size at which ``noise`` is tried, unless a batch of it is to do, and
    the first ``kinds`` (or all); ``small`` the sizes of a few pixels, ``in_a_row`` how many consecutive sizes,
    ``batches`` what is added to the batch. On ``sampled`` trials the effect of rounding is measured in any case, which
    costs as much as the network has weights. A site by itself is tried at its last ``of_site`` sizes; one of many
    weights, where a run takes longer than all else, at ``of_large_site``. ``drift_of_site`` asks for its rounding in
    the stored dtype, too; that of the whole network is measured on the first ``of_drift`` trials, or all.
    """

    seeds: tuple[int, ...] = (0,)
    parts: tuple[int, ...] = (4,)
    small: tuple[int, ...] = (1, 2, 7)
    sampled: int = 3
    batches: tuple[int, ...] = (1,)
    in_a_row: int = 0
    noise: bool = True
    kinds: int | None = None
    of_site: int = 4
    of_large_site: int = 2
    drift_of_site: bool = True
    of_drift: int | None = None


# Small sizes are less than a kernel's reach, odd and even: there mistakes at the border are all there is.
SCOPES = {
    Effort.QUICK: Scope(
        parts=(8,),
        small=(2,),
        sampled=1,
        kinds=1,
        noise=False,
        of_site=1,
        of_large_site=1,
        drift_of_site=False,
        of_drift=2,
    ),
    Effort.DEFAULT: Scope(),
    Effort.THOROUGH: Scope(
        seeds=(0, 1, 2, 3),
        parts=(1, 2, 4),
        small=(1, 2, 3, 4, 5, 6, 7, 9),
        sampled=7,
        batches=(1, 6),
        in_a_row=32,
        of_large_site=4,
    ),
}


def known_effort(effort: Effort | str) -> Effort:
    """Return the effort of this name. Raises RepfuseError where there is none."""
    if effort not in SCOPES:
        raise RepfuseError(f"There is no effort {str(effort)!r}.", "", f"Choose one of {', '.join(SCOPES)}.")
    return Effort(effort)


LARGE = 10  # times the usual inputs
FAINT = 1 / 64  # times the usual inputs: what lies where a kind has nothing to show

Kind = Callable[[Sizes, Sizes, torch.Generator], torch.Tensor]
"""Makes a tensor of a shape, whose spatial axes are given, in float64."""


def noise(shape: Sizes, _axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def large(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return noise that is LARGE times larger."""
    return LARGE * noise(shape, axes, generator)


def nearly_constant(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return a level per sample and channel, between 1/2 and 3/2 and of either sign, and faint noise."""
    levels = noise(tuple(1 if axis in axes else n for axis, n in enumerate(shape)), axes, generator)
    return levels.sign() * (0.5 + levels.abs().frac()) + FAINT * noise(shape, axes, generator)


def impulses(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return large numbers at the pixels of a grid, four along each axis, and faint noise between them."""
    here = reduce(and_, (_along(shape, axis, _apart(shape[axis])) for axis in axes))
    return torch.where(here, LARGE, FAINT) * noise(shape, axes, generator)


def frame(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return noise in the outermost pixels, and faint noise within."""
    outermost = reduce(or_, (_along(shape, axis, (0, shape[axis] - 1)) for axis in axes))
    return torch.where(outermost, 1, FAINT) * noise(shape, axes, generator)


def _apart(n: int) -> Sizes:
    """Return both ends, and between them an odd and an even position, as far apart as they fit."""
    first, second = n // 3, 2 * n // 3
    return (0, first, second + (second - first + 1) % 2, n - 1)


def _along(shape: Sizes, axis: int, positions: Iterable[int]) -> torch.Tensor:
    """Return where the index along ``axis`` is one of these, to be broadcast."""
    found = torch.isin(torch.arange(shape[axis]), torch.tensor([*positions], dtype=torch.int64))
    return found.reshape([-1 if other == axis else 1 for other in range(len(shape))])


KINDS: dict[str, Kind] = {
    "large": large,
    "nearly constant": nearly_constant,
    "impulses": impulses,
    "frame": frame,
}
OF_FEATURES = ("large", "impulses")
"""The kinds that make sense of plain features, ``[batch, features]``."""

MULTIPLE = 32  # the total stride of many networks, some of which take its multiples only


class Extent(NamedTuple):
    """Where and how large: the spatial axes, and the size along them (none: the example's own)."""

    axes: Sizes
    size: Sizes = ()


class Example:
    """The example's inputs out of their tuples, lists and dicts, into which those of trials are put again."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.leaves, self._structure = tree_flatten(tuple(inputs))

    @cached_property
    def batch(self) -> int | None:
        """The batch of the first tensor that has one."""
        return next((x.shape[0] for x in self.leaves if isinstance(x, torch.Tensor) and x.dim()), None)

    @cached_property
    def floating(self) -> bool:
        """Whether any input is of floating numbers."""
        return any(is_floating(x) for x in self.leaves)

    @cached_property
    def main(self) -> Sizes:
        """The shape of the first floating input with spatial axes, else of one with features, or ()."""
        shapes = [tuple(x.shape) for x in self.leaves if is_floating(x)]
        spatial = (shape for shape in shapes if is_spatial(shape))
        return next(spatial, next((shape for shape in shapes if len(shape) == 2), ()))

    @cached_property
    def readings(self) -> tuple[Sizes, ...]:
        """The spatial axes, as channels come first and as they come last."""
        ndim = len(self.main)
        return (tuple(range(2, ndim)), tuple(range(1, ndim - 1))) if is_spatial(self.main) else ()

    def size(self, axes: Sizes) -> Sizes:
        """Return the example's size along these axes."""
        return tuple(self.main[axis] for axis in axes)

    def reduced(self, part: int, least: int = 1) -> list[Extent]:
        """Return extents of about a ``part``-th of the size, not square, odd and even, then multiples of MULTIPLE.

        Those that are smaller than ``least`` along an axis are left out.
        """
        extents = []
        for axes in self.readings:
            own = self.size(axes)
            extents.append(Extent(axes, tuple(max(1, n // part + number % 2) for number, n in enumerate(own))))
            whole = tuple((n // part // MULTIPLE + (number + 1) % 2) * MULTIPLE for number, n in enumerate(own))
            if all(0 < new < n for new, n in zip(whole, own, strict=True)):
                extents.append(Extent(axes, whole))
        return [extent for extent in dict.fromkeys(extents) if min(extent.size) >= least]

    def larger(self) -> Iterator[list[Extent]]:
        """Yield, for each spatial axis, extents where it is larger than in the example and the others an eighth.

        Odd steps first, then the next multiple of MULTIPLE, then twice the size.
        """
        for number in range(len(self.readings[0]) if self.readings else 0):
            extents = []
            for axes in self.readings:
                own = self.size(axes)
                for more in (own[number] + 5, (own[number] // MULTIPLE + 1) * MULTIPLE, 2 * own[number]):
                    least = MULTIPLE if more % MULTIPLE == 0 else 1
                    others = (max(n // 8 // least * least, min(n, least)) for n in own)
                    size = tuple(more if axis == number else n for axis, n in enumerate(others))
                    extents += [Extent(axes, size), Extent(axes, (*own[:number], more, *own[number + 1 :]))]
            yield list(dict.fromkeys(extents))

    def trial(
        self, label: str, kind: Kind, extents: Sequence[Extent], seed: int, *, batch: int = 0, sampled: bool = False
    ) -> Trial:
        """Return new inputs: floating ones of this kind and the first of these sizes, others with their values.

        All are of this batch. Where they are refused, the other sizes may be tried.
        """

        def made(extent: Extent) -> Trial:
            seeds = range(seed, seed + 1000 * len(self.leaves), 1000)
            leaves = [self._leaf(x, kind, extent, own, batch) for x, own in zip(self.leaves, seeds, strict=True)]
            size = "" if batch else "x".join(map(str, extent.size))
            inputs = tuple(tree_unflatten(leaves, self._structure))
            return Trial(f"{label} {size}".strip(), inputs, sampled=False)

        first, *others = extents
        return replace(made(first), sampled=sampled, otherwise=lambda: map(made, others))

    def _leaf(self, x: Any, kind: Kind, extent: Extent, seed: int, batch: int) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        shape = list(x.shape)
        alike = x.is_floating_point() and len(shape) == len(self.main)
        if extent.size and alike and all(shape[axis] == self.main[axis] for axis in extent.axes):
            for axis, n in zip(extent.axes, extent.size, strict=True):
                shape[axis] = n
        if batch and shape[:1] == [self.batch]:
            shape[0] = batch
        if not x.is_floating_point():
            return x[torch.arange(shape[0]) % len(x)] if shape else x  # over again where there are too few
        axes = extent.axes if len(shape) > max(extent.axes, default=0) else (1,)
        generator = torch.Generator().manual_seed(seed)
        sound = bool(axes) and max(axes) < len(shape) and all(shape)  # what has no such axes can only be noise
        found = (kind if sound else noise)(tuple(shape), axes, generator).to(dtype=x.dtype, device=x.device)
        if batch > 1 and is_spatial(tuple(shape)):
            found[-1] = 1  # a constant image: nothing but its border tells one pixel from another
        return found

    def small(self, n: int) -> list[Extent]:
        """Return this size along every axis, in each reading in which it is smaller than the example."""
        return [Extent(axes, (n,) * len(axes)) for axes in self.readings if n < min(self.size(axes))]

    def in_a_row(self, count: int) -> Iterator[list[Extent]]:
        """Yield consecutive sizes from about a quarter of the example's, and no larger: all remainders by a stride.

        The axes run through them in another order each, so that remainders meet.
        """
        for axes in self.readings[:1]:
            own = self.size(axes)
            count = min(count, *(n - n // 4 for n in own))
            for number in range(count):
                steps = (number, count - 1 - number, (number + count // 2) % count)
                yield [Extent(axes, tuple(max(1, n // 4) + step for n, step in zip(own, steps, strict=False)))]


def is_spatial(shape: Sizes) -> bool:
    """Whether a shape has a batch, channels, and one to three spatial axes."""
    return 3 <= len(shape) <= 5


# By the number of spatial axes: a kind has room from so many pixels along each, and a smaller example is tried at its
# own size, which costs little.
KIND_FROM = {1: 16, 2: 16, 3: 8}


def input_variants(
    example_inputs: Sequence[Any], *, seeds: Sequence[int] | None = None, effort: Effort | str = Effort.DEFAULT
) -> tuple[Trial, ...]:
    """Return trials around the example, the example itself first.

    Then a random input of its shape per further seed; for inputs with one to three spatial axes other sizes: about a
    quarter, not square, a few pixels, odd and even, and larger than the example along each axis; each kind of input
    (see ``repfuse.checking.inputs``) at about a quarter of the size, or half of it where a quarter has no room; a batch
    one larger than the example's, with random samples and one of ones, and a batch of 1.
    That is what the default ``effort`` does, in all about twice the example's own work, or eight times where the
    example is small or the network takes no other size; see ``Effort`` for the others. ``seeds`` are the effort's own
    where none are given.

    Random values are standard normal. Inputs that are not floating keep their values; they, too, follow the batch.
    Which trials a network accepts is for it to say, see ``repfuse.checking.comparison``. A kind that it does not take
    at the reduced size is there at other sizes, the example's at last, in ``Trial.otherwise``.
    """
    example, scope = Example(example_inputs), SCOPES[known_effort(effort)]
    first, *others = seeds or scope.seeds
    trials = [Trial("the example", tuple(example_inputs), sampled=False)]
    if example.floating:
        own = [Extent(example.readings[0] if example.readings else ())]
        trials += [example.trial(f"random, seed {seed}", noise, own, seed) for seed in others]
    if scope.noise:
        trials += _sizes(example, map(example.reduced, scope.parts), first)
    trials += _sizes(example, example.larger(), first, sampled=False)
    trials += [kind for part in scope.parts for kind in _kinds(example, scope.kinds, part, first)]
    trials += _sizes(example, map(example.small, reversed(scope.small)), first)
    trials += _batches(example, scope, first)
    trials += _sizes(example, example.in_a_row(scope.in_a_row), first, sampled=False)
    unique = {trial.label: trial for trial in trials}
    marked = [label for label, trial in unique.items() if trial.sampled][: scope.sampled]
    return tuple(replace(trial, sampled=label in marked) for label, trial in unique.items())


def _sizes(example: Example, sizes: Iterable[list[Extent]], seed: int, *, sampled: bool = True) -> Iterator[Trial]:
    """Yield noise of other sizes, each in the first reading that is taken."""
    for extents in filter(None, sizes):
        yield example.trial("size", noise, extents, seed + 10, sampled=sampled)


def _kinds(example: Example, count: int | None, part: int, seed: int) -> Iterator[Trial]:
    """Yield the first ``count`` kinds of input at a ``part``-th of the size, else at the example's."""
    names = KINDS if is_spatial(example.main) else OF_FEATURES if example.floating else ()
    for number, name in enumerate([*names][:count]):
        extents = _extents(example, part)
        yield example.trial(name, KINDS[name], extents, seed + 20 + number, sampled=name == "large")


def _extents(example: Example, part: int) -> list[Extent]:
    """Return where to try an input that may have any size: reduced, less so, and at last the example's own size."""
    axes = example.readings[0] if example.readings else (1,) if example.main else ()
    least = KIND_FROM.get(len(axes), 1)
    parts = dict.fromkeys((part, min(part, 4), min(part, 2)))
    return [*(extent for each in parts for extent in example.reduced(each, least)), Extent(axes)]


def _batches(example: Example, scope: Scope, seed: int) -> Iterator[Trial]:
    """Yield larger batches with a sample of ones, and a batch of 1, reduced as the kinds are."""
    batch = example.batch
    if batch is not None:
        for count in dict.fromkeys([*(batch + more for more in scope.batches), 1]):
            if count != batch:
                extents = _extents(example, scope.parts[-1])
                yield example.trial(f"batch {count}", noise, extents, seed + 30, batch=count)
