"""What both networks say of real inputs: whether they agree, and their accuracy where the labels are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.networks import between
from repfuse.progress import Progress
from repfuse.verifying.classes import NONE, Ranking, joined, ranking
from repfuse.verifying.copies import Outcome, as_stored, copy_with, run, run_copy
from repfuse.verifying.inputs import Trial
from repfuse.verifying.results import Flips, RealData
from repfuse.verifying.samples import Data, Samples, chunks, total

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
    with at least two classes (see ``repfuse.verifying.classes``). ``progress`` is told the fraction of the samples.
    Raises RepfuseError where a network refuses the data or the labels do not fit.
    """
    samples, before, after = _rankings(original, fused, data, progress)
    if labels is not None:
        _check(labels, samples, before)
        labels = labels.to("cpu", torch.int64)
    return RealData(
        samples=samples,
        compared=len(data_trial(data).inputs[0]),
        notes=data.notes if isinstance(data, Samples) else (),
        **_agreement(before, after, labels),
        **_accuracies(before, labels, "original"),
        **_accuracies(after, labels, "fused"),
    )


def class_count(network: nn.Module, inputs: Sequence[Any]) -> int | None:
    """Return the number of classes that the network tells apart on ``inputs``; None where it tells none."""
    found = ranking(_first(run(network, [Trial("the example", tuple(inputs))], {})[0]))
    return found.classes if found else None


def takes(network: nn.Module, inputs: Sequence[Any]) -> bool:
    """Return whether the network, as it is stored, runs on ``inputs``."""
    return not run(network, [Trial("the example", tuple(inputs))], {})[0].error


def _rankings(
    original: nn.Module, fused: nn.Module, data: Data, progress: Progress
) -> tuple[int, Ranking | None, Ranking | None]:
    """Return the number of samples and what each network says of them."""
    sides: tuple[tuple[nn.Module, Cast], ...] = ((original, {}), (fused, between(original, fused)))
    found: tuple[list[Ranking | None], list[Ranking | None]] = [], []
    pieces, samples, count = chunks(data), 0, total(data)
    while group := list(islice(pieces, GROUP)):
        for (network, cast), rankings in zip(sides, found, strict=True):
            copied = copy_with(network, as_stored)  # one copy at a time
            rankings += [ranking(_first(_outcome(copied, chunk, cast))) for chunk in group]
            del copied
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
            f"{outcome.error}.",
            "Give data of the shape and dtype that the network takes.",
        )
    return outcome


def _first(outcome: Outcome) -> torch.Tensor:
    return next(iter(outcome.outputs.values()), torch.empty(0))


def _agreement(before: Ranking | None, after: Ranking | None, labels: torch.Tensor | None) -> dict[str, Any]:
    if before is None or after is None:
        return {"top1_agreement": None}
    agreed = before.agrees(after)
    on_top = _share(before.agrees_on_top(after)) if before.has_top and after.has_top else None
    unknown = int(((before.first == NONE) | (after.first == NONE)).sum())
    flips = _flips(before, after, labels)
    return {"top1_agreement": _share(agreed), "top5_agreement": on_top, "without_class": unknown, "flips": flips}


def _flips(before: Ranking, after: Ranking, labels: torch.Tensor | None) -> Flips:
    flipped = ~before.agrees(after)
    margins = before.margins[flipped]
    extremes = (float(margins.min()), float(margins.max())) if len(margins) else (None, None)
    if labels is None:
        return Flips(len(margins), None, None, *extremes)
    right, still = before.hits(labels), after.hits(labels)
    return Flips(len(margins), int((right & ~still).sum()), int((~right & still).sum()), *extremes)


def _accuracies(found: Ranking | None, labels: torch.Tensor | None, side: str) -> dict[str, Any]:
    if found is None or labels is None:
        return {f"accuracy_{side}": None}
    on_top = _share(found.hits_on_top(labels)) if found.has_top else None
    return {f"accuracy_{side}": _share(found.hits(labels)), f"top5_accuracy_{side}": on_top}


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
