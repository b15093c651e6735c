"""The inputs on which two networks are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

# Smaller than a kernel's reach, odd and even: there mistakes at the border are all there is.
SMALL = (1, 2, 3, 5, 7)
# Times the usual inputs: wakes units that biases keep silent, and brings weights out against biases.
LARGE = 10
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """One set of inputs for a call of both networks, and what to call it in a report.

    ``yardstick`` says whether the effect of rounding is measured on it, which takes several runs of each network;
    elsewhere the largest effect on the yardsticks counts.
    """

    label: str
    inputs: tuple[Any, ...]
    yardstick: bool = True

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of each tensor input."""
        return tuple(tuple(x.shape) for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor))


def input_variants(example_inputs: Sequence[Any], *, seeds: Sequence[int] = (0,)) -> tuple[Trial, ...]:
    """Return trials around the example, the example itself first.

    Then a random input of its shape that is LARGE times larger; a batch one larger than the example's, with random
    samples and one of ones, for the first seed; a random input per further seed; a batch of 1; and, for inputs
    with one to three spatial axes, other sizes: about half, not square, odd and even, and SMALL as far as they
    are smaller than the example. In all about five times the example's own work.

    Random values are standard normal. Inputs that are not floating keep their values; they, too, follow the
    batch. Which trials a network accepts is for it to say: see ``repfuse.verifying.compare``.
    """
    example, structure = _flat(example_inputs)
    batch = _batch(example)
    trials = [Trial("the example", example)]
    if any(_floating(x) for x in example):
        trials += [Trial(f"random x{LARGE}", _larger(_at(example, seed=LARGE)))]
        trials += [Trial(f"random, seed {seed}", _at(example, seed=seed), yardstick=False) for seed in seeds[1:]]
    if batch is not None:
        first = seeds[0] if seeds else 0
        trials += [Trial(f"batch {batch + 1}", _with_ones(_at(example, batch=batch + 1, seed=first)), False)]
        trials += [Trial("batch 1", _at(example, batch=1, seed=first), yardstick=False)] * (batch > 1)
    sizes = dict.fromkeys(_sizes(_spatial(example)))
    trials += [Trial(_name(size), _at(example, spatial=size, seed=LARGE)) for size in sizes]
    return _rebuilt(trials, structure)


def shaped(example_inputs: Sequence[Any], shapes: Sequence[Shape], seeds: Sequence[int]) -> tuple[Trial, ...]:
    """Return random trials with the first input of each given shape; the other inputs follow its batch."""
    example, structure = _flat(example_inputs)
    trials = []
    for shape in shapes:
        follow = (_at(example, batch=shape[0], seed=seed)[1:] for seed in seeds)
        trials += [
            Trial(f"{'x'.join(map(str, shape))}, seed {seed}", (_random(example[0], shape, seed), *rest))
            for seed, rest in zip(seeds, follow, strict=True)
        ]
    return _rebuilt(trials, structure)


def rounded_through(trial: Trial, dtype: torch.dtype | None) -> Trial:
    """Return the trial with floating inputs that both their own dtype and ``dtype`` hold exactly."""
    if dtype is None:
        return trial
    inputs = tree_map(lambda x: x.to(dtype).to(x.dtype) if _floating(x) else x, trial.inputs)
    return replace(trial, inputs=tuple(inputs))


def _flat(example_inputs: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    """Return the inputs out of their tuples, lists and dicts, and the structure that these are."""
    leaves, structure = tree_flatten(tuple(example_inputs))
    return tuple(leaves), structure


def _rebuilt(trials: Sequence[Trial], structure: Any) -> tuple[Trial, ...]:
    return tuple(replace(trial, inputs=tree_unflatten(trial.inputs, structure)) for trial in trials)


def _larger(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x * LARGE if _floating(x) else x for x in inputs)


def _with_ones(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the last sample a constant image: nothing but its border tells one pixel from another."""
    for x in inputs:
        if _varies(x):
            x[-1] = 1
    return inputs


def _sizes(spatial: Shape) -> Iterator[Shape]:
    if not spatial:
        return
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
