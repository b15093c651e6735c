"""The inputs on which two networks are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SMALL = (
    1,
    2,
    3,
    5,
    7,
)  # smaller than a kernel's reach, odd and even: where mistakes at the border are all there is
LARGE = 10  # times the usual inputs: wakes units that biases keep silent, and brings weights out against biases
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """One set of inputs for a call of both networks, and what to call it in a report."""

    label: str
    inputs: tuple[Any, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of each tensor input."""
        return tuple(tuple(x.shape) for x in self.inputs if isinstance(x, torch.Tensor))


def input_variants(example_inputs: Sequence[Any], *, seeds: Sequence[int] = (0,)) -> tuple[Trial, ...]:
    """Return trials around the example, the example itself first.

    Then one random input of its shape per seed, and one LARGE times larger; a batch of 1 or one larger than the
    example's, with one random sample and one of ones; and, for inputs with one to three spatial axes, other
    sizes: one more and one less (which is neither square nor even), half, and SMALL as far as they are smaller
    than the example. In all about six times the example's own work.

    Random values are standard normal. Inputs that are not floating keep their values; they, too, follow the
    batch. Which trials a network accepts is for it to say: see ``repfuse.verify.compare``.
    """
    example = tuple(example_inputs)
    trials = [Trial("the example", example)]
    if any(_floating(x) for x in example):
        trials += [Trial(f"random, seed {seed}", _at(example, seed=seed)) for seed in seeds]
        trials += [Trial(f"random x{LARGE}", _larger(_at(example, seed=-1)))]
    batch = _batch(example)
    if batch is not None:
        trials += [_batch_trial(example, size) for size in dict.fromkeys((1, batch + 1)) if size != batch]
    sizes = dict.fromkeys(_sizes(_spatial(example)))
    trials += [Trial(_name(size), _at(example, spatial=size, seed=seeds[0] if seeds else 0)) for size in sizes]
    return tuple(trials)


def shaped(example_inputs: Sequence[Any], shapes: Sequence[Shape], seeds: Sequence[int]) -> tuple[Trial, ...]:
    """Return random trials with the first input of each given shape; the other inputs follow its batch."""
    example = tuple(example_inputs)
    trials = []
    for shape in shapes:
        follow = (_at(example, batch=shape[0], seed=seed)[1:] for seed in seeds)
        trials += [
            Trial(f"{'x'.join(map(str, shape))}, seed {seed}", (_random(example[0], shape, seed), *rest))
            for seed, rest in zip(seeds, follow, strict=True)
        ]
    return tuple(trials)


def rounded_through(trial: Trial, dtype: torch.dtype | None) -> Trial:
    """Return the trial with floating inputs that both their own dtype and ``dtype`` hold exactly."""
    if dtype is None:
        return trial
    inputs = (x.to(dtype).to(x.dtype) if _floating(x) else x for x in trial.inputs)
    return Trial(trial.label, tuple(inputs))


def _larger(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x * LARGE if _floating(x) else x for x in inputs)


def _batch_trial(example: tuple[Any, ...], size: int) -> Trial:
    inputs = _at(example, batch=size, seed=0)
    for x in inputs if size > 1 else ():
        if _varies(x):
            x[-1] = 1  # a constant image: nothing but its border distinguishes one pixel from another
    return Trial(f"batch {size}", inputs)


def _sizes(spatial: Shape) -> Iterator[Shape]:
    if not spatial:
        return
    yield tuple(max(1, n + (1 if axis % 2 == 0 else -1)) for axis, n in enumerate(spatial))
    yield tuple(max(1, n // 2 + axis % 2) for axis, n in enumerate(spatial))
    yield from ((small,) * len(spatial) for small in SMALL if small < min(spatial))


def _at(example: tuple[Any, ...], *, batch: int | None = None, spatial: Shape = (), seed: int) -> tuple[Any, ...]:
    """Return random inputs like the example, with another batch or spatial size where an input has them."""
    old_batch, old_spatial = _batch(example), _spatial(example)
    inputs = []
    for position, x in enumerate(example):
        if not isinstance(x, torch.Tensor):
            inputs.append(x)
            continue
        shape = tuple(x.shape)
        if spatial and _varies(x) and shape[2:] == old_spatial:
            shape = (*shape[:2], *spatial)
        if batch is not None and shape[:1] == (old_batch,):
            shape = (batch, *shape[1:])
        inputs.append(_random(x, shape, seed + 1000 * position))
    return tuple(inputs)


def _random(like: torch.Tensor, shape: Shape, seed: int) -> torch.Tensor:
    if like.is_floating_point():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return noise.to(dtype=like.dtype, device=like.device)
    if not like.dim() or shape[0] == like.shape[0]:
        return like
    return like[torch.arange(shape[0]) % like.shape[0]]


def _floating(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _varies(x: Any) -> bool:
    return _floating(x) and 3 <= x.dim() <= 5


def _batch(example: tuple[Any, ...]) -> int | None:
    return next((x.shape[0] for x in example if isinstance(x, torch.Tensor) and x.dim()), None)


def _spatial(example: tuple[Any, ...]) -> Shape:
    return next((tuple(x.shape[2:]) for x in example if _varies(x)), ())


def _name(size: Shape) -> str:
    return f"size {'x'.join(map(str, size))}"
