"""What both networks say of real inputs: whether they agree, and their accuracy where the labels are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from repfuse.checking.inputs import Trial
from repfuse.checking.results import Flip, Flips, RealData
from repfuse.checking.runs import Outcome, as_stored, copied, run, run_copy
from repfuse.errors import RepfuseError
from repfuse.networks import between, why_refused
from repfuse.wording import Progress

# Real inputs in batches that are made when they are asked for: a folder of 50,000 images never lies in memory.


CHUNK = 64  # samples per call, at most
PER_CALL = 1 << 21  # input elements per call, so that activations stay small: 13 images of 3x224x224
Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Samples:
    """``count`` samples of ``numbers`` elements each, for the network's first input.

    ``make`` returns the samples ``[k, ...]`` at ``k`` positions in a row. ``notes`` say how they were made. ``at_once``
    is the most that a network takes in one call. ``names`` are those of the samples, where they have other names than
    their positions.
    """

    count: int
    numbers: int
    make: Callable[[range], torch.Tensor]
    notes: tuple[str, ...] = ()
    at_once: int = CHUNK
    names: Sequence[str] = ()

    def __iter__(self) -> Iterator[torch.Tensor]:
        step = min(self.at_once, per_call(self.numbers))
        for start in range(0, self.count, step):
            yield self.make(range(start, min(start + step, self.count)))


Data = torch.Tensor | Samples | Iterable[torch.Tensor | Inputs]
"""One batch, or several that can be walked more than once; a tuple each where the network takes several inputs."""


def per_call(numbers: int) -> int:
    """Return how many samples of so many elements go into one call: one at least."""
    return min(CHUNK, max(1, PER_CALL // max(1, numbers)))


def chunks(data: Data) -> Iterator[Inputs]:
    """Yield ``data`` in pieces that fit one call each. Raises RepfuseError where it holds no samples."""
    if isinstance(data, Iterator):
        what = f"The data is a {type(data).__name__}, which can be walked only once."
        raise RepfuseError(what, "It is walked several times.", "Give a tensor, a list of batches, or the like.")
    found = False
    for batch in [data] if isinstance(data, torch.Tensor) else data:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        step = per_call(inputs[0][:1].numel())
        for start in range(0, len(inputs[0]), step):
            found = True
            yield tuple(x[start : start + step] for x in inputs)
    if not found:
        raise RepfuseError("The data holds no samples.", "", "Give at least one input of the network's shape.")


# Which classes a network gives each sample, best first, and how sure it is of the first.
#
# Classes rank by their output, the highest first; among equal ones the lower number comes first, so that two networks
# with equal outputs always rank alike. A sample with an output that is not a number has no class: NONE.


TOP = 5
NONE = -1


@dataclass(frozen=True)
class Ranking:
    """``best`` [samples, min(TOP, classes)] are the classes, best first; NONE in the whole row where there are none.

    ``margins`` [samples], in float64: the highest output less the second, relative to the row's largest magnitude.
    """

    best: torch.Tensor
    margins: torch.Tensor
    classes: int

    @property
    def first(self) -> torch.Tensor:
        """The class of each sample."""
        return self.best[:, 0]

    @property
    def has_top(self) -> bool:
        """Whether the best five say more than all: for TOP classes or fewer they are always the same."""
        return self.classes > TOP

    def agrees(self, other: Ranking) -> torch.Tensor:
        """Return for each sample whether both give it the same class."""
        return (self.first == other.first) & (self.first != NONE)

    def agrees_on_top(self, other: Ranking) -> torch.Tensor:
        """Return for each sample whether the best five are the same set of classes, in whatever order."""
        same = self.best.sort(dim=1).values == other.best.sort(dim=1).values
        return same.all(dim=1) & (self.first != NONE)

    def accuracy(self, labels: torch.Tensor) -> tuple[float, float | None]:
        """Return the fraction of the samples whose class is the label, and of those with it among the best five."""
        hits = self.best == labels[:, None]
        return _share(hits[:, 0]), _share(hits.any(dim=1)) if self.has_top else None


def ranking(scores: torch.Tensor) -> Ranking | None:
    """Return the ranking of ``scores`` [samples, classes]; None where they are no table of two classes or more."""
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        return None
    scores = scores.double()
    order = scores.argsort(dim=1, descending=True, stable=True)
    best = order[:, :TOP].masked_fill(scores.isnan().any(dim=1, keepdim=True), NONE)
    first, second = scores.gather(1, order[:, :2]).unbind(dim=1)
    scale = scores.abs().amax(dim=1).clamp(min=torch.finfo(scores.dtype).tiny)
    margins = ((first - second) / scale).nan_to_num(nan=math.inf, posinf=math.inf)
    return Ranking(best, margins, scores.shape[1])


def joined(rankings: Sequence[Ranking | None]) -> Ranking | None:
    """Return the rankings of all samples as one; None where some have none, or another number of classes."""
    known = [one for one in rankings if one is not None]
    if not known or len(known) < len(rankings) or len({one.classes for one in known}) > 1:
        return None
    best, margins = torch.cat([one.best for one in known]), torch.cat([one.margins for one in known])
    return Ranking(best, margins, known[0].classes)


GROUP = 4  # calls of one network in a row, on data that is made once for both
COMPARED = 1 << 20  # input elements that also take part in the comparison, which runs each network ten times
Cast = Mapping[torch.dtype, torch.dtype]


def data_trial(data: Data) -> Trial:
    """Return as many of the first samples as COMPARED allows, one at least and one call's at most, as a trial."""
    first = next(chunks(data))
    samples = max(1, COMPARED // max(1, first[0][0].numel()))
    return Trial("the data", tuple(x[:samples] for x in first))


def agreement(
    original: nn.Module,
    fused: nn.Module,
    data: Data,
    labels: torch.Tensor | None,
    progress: Progress = lambda _stage, _fraction: None,
) -> RealData:
    """Run both networks, as they are stored, over all of ``data``: some pieces at a time, those through both in turn.

    ``labels`` holds one class index per sample. Classes are told where the first output is ``[samples, classes]``
    with at least two classes. ``progress`` is told the fraction of the samples.
    Raises RepfuseError where a network refuses the data or the labels do not fit.
    """
    samples, before, after = _rankings(original, fused, data, progress)
    if labels is not None:
        _check(labels, samples, before)
        labels = labels.to("cpu", torch.int64)
    made = data if isinstance(data, Samples) else None
    agreed = on_top = flips = None
    unknown = 0
    if before and after:
        agreed = _share(before.agrees(after))
        on_top = _share(before.agrees_on_top(after)) if before.has_top and after.has_top else None
        flips = _flips(before, after, labels, made.names if made else ())
        unknown = int(((before.first == NONE) | (after.first == NONE)).sum())
    accuracies = [each.accuracy(labels) if each and labels is not None else (None, None) for each in (before, after)]
    (first, other), (first_on_top, other_on_top) = zip(*accuracies, strict=True)
    return RealData(
        samples=samples,
        compared=len(data_trial(data).inputs[0]),
        top1_agreement=agreed,
        accuracy_original=first,
        accuracy_fused=other,
        top5_agreement=on_top,
        top5_accuracy_original=first_on_top,
        top5_accuracy_fused=other_on_top,
        flips=flips,
        without_class=unknown,
        notes=made.notes if made else (),
    )


def class_count(network: nn.Module, inputs: Sequence[Any]) -> int | None:
    """Return the number of classes that the network tells apart on ``inputs``; None where it tells none."""
    found = ranking(_first(run(network, [Trial("the example", tuple(inputs))], {})[0]))
    return found.classes if found else None


def _rankings(
    original: nn.Module, fused: nn.Module, data: Data, progress: Progress
) -> tuple[int, Ranking | None, Ranking | None]:
    """Return the number of samples and what each network says of them."""
    sides: tuple[tuple[nn.Module, Cast], ...] = ((original, {}), (fused, between(original, fused)))
    found: tuple[list[Ranking | None], list[Ranking | None]] = [], []
    pieces, samples = chunks(data), 0
    count = data.count if isinstance(data, Samples) else None  # of others it is not known without making them
    while group := list(islice(pieces, GROUP)):
        for (network, cast), rankings in zip(sides, found, strict=True):
            with copied(network, as_stored) as copy:  # one at a time
                rankings += [ranking(_first(_outcome(copy, chunk, cast))) for chunk in group]
        samples += sum(len(chunk[0]) for chunk in group)
        del group  # before the next is made
        progress(f"real data, {samples:,} samples", samples / count if count else 0.0)
    return samples, joined(found[0]), joined(found[1])


def _outcome(network: nn.Module, inputs: tuple[Any, ...], cast: Cast) -> Outcome:
    outcome = run_copy(network, [Trial("the data", inputs)], cast)[0]
    if outcome.error:
        shape = "x".join(map(str, inputs[0].shape))
        raise RepfuseError(
            f"A network cannot run on the data (a batch of it is {shape}).",
            why_refused(network, inputs, outcome.error)[0],
            "Give data of the shape and dtype that the network takes.",
        )
    return outcome


def _first(outcome: Outcome) -> torch.Tensor:
    return next(iter(outcome.outputs.values()), torch.empty(0))


FLIPS_LISTED = 20


def _flips(before: Ranking, after: Ranking, labels: torch.Tensor | None, names: Sequence[str]) -> Flips:
    flipped = (~before.agrees(after)).nonzero().flatten()
    worst = flipped[before.margins[flipped].argsort(descending=True, stable=True)].tolist()
    margins = before.margins[worst].tolist()
    right_to_wrong = wrong_to_right = None
    if labels is not None:
        right, still = before.first == labels, after.first == labels
        right_to_wrong, wrong_to_right = int((right & ~still).sum()), int((~right & still).sum())
    least, most = (margins[-1], margins[0]) if margins else (None, None)
    shown = worst[:FLIPS_LISTED]
    called = [names[at] if names else str(at) for at in shown]
    known = [None] * len(shown) if labels is None else labels[shown].tolist()
    first = map(Flip, called, before.first[shown].tolist(), after.first[shown].tolist(), known)
    return Flips(len(worst), right_to_wrong, wrong_to_right, least, most, tuple(first))


def _check(labels: torch.Tensor, samples: int, found: Ranking | None) -> None:
    if found is None:
        why = "The network's first output is not a table of samples by classes."
    elif labels.shape != (samples,) or labels.is_floating_point() or labels.is_complex():
        why = f"There are {samples} samples, and the labels are {tuple(labels.shape)} of {labels.dtype}."
    else:
        least, most = (int(label) for label in labels.to(torch.int64).aminmax())
        if 0 <= least <= most < found.classes:
            return
        why = f"The network has the classes 0 to {found.classes - 1}, and the labels go from {least} to {most}."
    raise RepfuseError("The labels do not fit.", why, "Give one class number per sample, from 0, for a classifier.")


def _share(hits: torch.Tensor) -> float:
    return float(hits.double().mean())
