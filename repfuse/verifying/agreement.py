"""What both networks say of real inputs: top-1 agreement, and accuracy where the labels are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.networks import between
from repfuse.verifying.copies import as_stored, copy_with, run
from repfuse.verifying.inputs import Trial
from repfuse.verifying.results import RealData

Data = torch.Tensor | Sequence[torch.Tensor | tuple[torch.Tensor, ...]]
CHUNK = 64  # samples per call
COMPARED = 1 << 20  # input elements that also take part in the comparison, which runs each network ten times


def data_trial(data: Data) -> Trial:
    """Return as many of the first samples as COMPARED allows, one at least and CHUNK at most, as a trial."""
    first = next(_chunks(data))
    samples = max(1, COMPARED // max(1, first[0][0].numel()))
    return Trial("the data", tuple(x[:samples] for x in first))


def agreement(original: nn.Module, fused: nn.Module, data: Data, labels: torch.Tensor | None) -> RealData:
    """Run both networks, as they are stored, over all of ``data``.

    ``data`` is one batch of real inputs, or several (a tuple each where the network takes several inputs);
    ``labels`` one class index per sample. Classes are told where the first output is ``[samples, classes]``
    with at least two classes. Raises RepfuseError where the original refuses the data or the labels do not fit.
    """
    chunks = [Trial("the data", chunk) for chunk in _chunks(data)]
    samples = sum(len(chunk.inputs[0]) for chunk in chunks)
    before = _classes(original, chunks, {})
    after = _classes(fused, chunks, between(original, fused))
    if labels is not None:
        _check(labels, samples, before)
    return RealData(
        samples=samples,
        compared=len(data_trial(data).inputs[0]),
        top1_agreement=_share(before, after),
        accuracy_original=_share(before, labels),
        accuracy_fused=_share(after, labels),
    )


def _chunks(data: Data) -> Iterator[tuple[torch.Tensor, ...]]:
    batches = [data] if isinstance(data, torch.Tensor) else data
    found = False
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        for start in range(0, len(inputs[0]), CHUNK):
            found = True
            yield tuple(x[start : start + CHUNK] for x in inputs)
    if not found:
        raise RepfuseError("The data holds no samples.", "", "Give at least one input of the network's shape.")


def _classes(network: nn.Module, chunks: list[Trial], cast: dict[torch.dtype, torch.dtype]) -> torch.Tensor | None:
    """Return the class of each sample, or None where the first output is no table of classes."""
    outcomes = run(copy_with(network, as_stored), chunks, cast)
    failed = next((outcome.error for outcome in outcomes if outcome.error), "")
    if failed:
        shape = "x".join(map(str, chunks[0].inputs[0].shape))
        raise RepfuseError(
            f"A network cannot run on the data (the first batch is {shape}).",
            f"{failed}.",
            "Give data of the shape and dtype that the network takes.",
        )
    first = [next(iter(outcome.outputs.values())) for outcome in outcomes if outcome.outputs]
    tables = [x for x in first if x.dim() == 2 and x.shape[1] >= 2 and x.is_floating_point()]
    return torch.cat([x.argmax(dim=1) for x in tables]) if tables and len(tables) == len(chunks) else None


def _check(labels: torch.Tensor, samples: int, classes: torch.Tensor | None) -> None:
    if classes is None:
        why = "the network's first output is not a table of samples by classes"
    elif labels.shape != (samples,) or labels.is_floating_point():
        why = f"there are {samples} samples, and the labels are {tuple(labels.shape)} of {labels.dtype}"
    else:
        return
    raise RepfuseError("The labels do not fit.", f"{why}.", "Give one integer class per sample, for a classifier.")


def _share(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    if a is None or b is None or a.shape != b.shape:
        return None
    return float((a == b.to(a.device)).double().mean())
