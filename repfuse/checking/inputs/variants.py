"""The trials around an example, by effort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from repfuse.checking.inputs.example import Example, Place, is_spatial
from repfuse.checking.inputs.kinds import KINDS, OF_FEATURES, Kind, noise
from repfuse.checking.inputs.trial import Effort, Scope, Trial, is_floating, mapped, scope_of

# By the number of spatial axes: a kind has room from so many pixels along each, and a smaller example is tried at its
# own size, which costs little.
KIND_FROM = {1: 16, 2: 16, 3: 8}


def input_variants(
    example_inputs: Sequence[Any], *, seeds: Sequence[int] | None = None, effort: Effort | str = Effort.DEFAULT
) -> tuple[Trial, ...]:
    """Return trials around the example, the example itself first.

    Then a random input of its shape per further seed; for inputs with one to three spatial axes other sizes: about
    half, not square, a few pixels, odd and even, and larger than the example along each axis; each kind of input (see
    ``repfuse.checking.inputs.kinds``) at about half the size; a batch one larger than the example's, with random
    samples and one of ones, and a batch of 1.
    That is what the default ``effort`` does, in all about three times the example's own work, or eight times where the
    example is small or the network takes no other size; see ``Effort`` for the others. ``seeds`` are the effort's own
    where none are given.

    Random values are standard normal. Inputs that are not floating keep their values; they, too, follow the batch.
    Which trials a network accepts is for it to say, see ``repfuse.checking.comparison``. A kind that it does not take
    at the reduced size is there at other sizes, the example's at last, in ``Trial.otherwise``.
    """
    example, scope = Example(example_inputs), scope_of(effort)
    first, *others = seeds or scope.seeds
    trials = [Trial("the example", example.leaves, sampled=False)]
    if example.floating:
        own = Place(example.readings[0] if example.readings else ())
        trials += [_one(example, f"random, seed {seed}", noise, own, seed) for seed in others]
    trials += _sizes(example, map(example.reduced, scope.parts), first)
    trials += _sizes(example, example.larger(), first, sampled=False)
    trials += [kind for part in scope.parts for kind in _kinds(example, part, first)]
    trials += _sizes(example, reversed([*example.small(scope.small)]), first)
    trials += _batches(example, scope, first)
    trials += _in_a_row(example, scope.in_a_row, first)
    unique = [*{trial.label: trial for trial in trials}.values()]
    marked = [trial for trial in unique if trial.sampled][: scope.sampled]
    return tuple(
        mapped(replace(trial, sampled=any(trial is one for one in marked)), example.rebuilt) for trial in unique
    )


def _sizes(example: Example, sizes: Iterable[list[Place]], seed: int, *, sampled: bool = True) -> Iterator[Trial]:
    """Yield noise of other sizes, each in the first reading that is taken."""
    for places in filter(None, sizes):
        trial = _first_of(partial(_one, example, "size", noise, place, seed + 10) for place in places)
        yield replace(trial, sampled=sampled)


def _in_a_row(example: Example, count: int, seed: int) -> Iterator[Trial]:
    """Yield consecutive sizes from about a quarter of the example's, and no larger: all remainders by a stride.

    The axes run through them in another order each, so that remainders meet.
    """
    axes = example.readings[0] if example.readings else ()
    count = min(count, *(n - n // 4 for n in example.size(axes))) if axes else 0
    for number in range(count):
        steps = (number, count - 1 - number, (number + count // 2) % count)
        size = tuple(max(1, n // 4) + step for n, step in zip(example.size(axes), steps, strict=False))
        yield _one(example, "size", noise, Place(axes, size), seed + 10)


def _kinds(example: Example, part: int, seed: int) -> Iterator[Trial]:
    """Yield each kind of input at a ``part``-th of the size, else at the example's."""
    names = KINDS if is_spatial(example.main) else OF_FEATURES if example.floating else ()
    for number, name in enumerate(names):
        makers = [
            partial(_one, example, name, KINDS[name], place, seed + 20 + number) for place in _places(example, part)
        ]
        yield replace(_first_of(makers), sampled=name == "large")


def _places(example: Example, part: int) -> list[Place]:
    """Return where to try an input that may have any size: reduced, and at last the example's own size."""
    axes = example.readings[0] if example.readings else (1,) if example.main else ()
    return [*example.reduced(part, KIND_FROM.get(len(axes), 1)), Place(axes)]


def _batches(example: Example, scope: Scope, seed: int) -> Iterator[Trial]:
    """Yield larger batches with a sample of ones, and a batch of 1, reduced as the kinds are."""
    batch = example.batch
    if batch is None:
        return
    for count in dict.fromkeys([*(batch + more for more in scope.batches), 1]):
        if count != batch:
            places = _places(example, scope.parts[-1])
            yield _first_of(partial(_batch_of, example, count, place, seed + 30) for place in places)


def _batch_of(example: Example, count: int, place: Place, seed: int) -> Trial:
    inputs = example.inputs(noise, place, seed, batch=count)
    for x in inputs if count > 1 else ():
        if is_floating(x) and is_spatial(tuple(x.shape)):
            x[-1] = 1  # a constant image: nothing but its border tells one pixel from another
    return Trial(f"batch {count}", inputs, sampled=False)


def _one(example: Example, label: str, kind: Kind, place: Place, seed: int) -> Trial:
    return Trial(f"{label} {place.name}".strip(), example.inputs(kind, place, seed), sampled=False)


def _first_of(makers: Iterable[Callable[[], Trial]]) -> Trial:
    """Return the first trial, with the others to be made where it is refused."""
    first, *others = makers
    return replace(first(), otherwise=lambda: (make() for make in others))
