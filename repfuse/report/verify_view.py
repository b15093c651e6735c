"""A verification for people: the errors of each output, real data, where they part, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repfuse.report.checks_view import Check, checks_view, of_drift, of_proof, of_site_drift, of_stored
from repfuse.report.tables import (
    BAD,
    GOOD,
    UNSURE,
    change,
    decibels,
    error,
    facts,
    heading,
    notes,
    percent,
    plural,
    shape,
)

if TYPE_CHECKING:
    from repfuse.checking.results import FewBits, FirstDifference, Flip, Flips, OutputError, RealData, Verification

VERDICTS = {"same": ("Same.", GOOD), "different": ("Different.", BAD), "could-not-tell": ("Could not tell.", UNSURE)}


def verify_view(verification: Verification, *, verbose: bool = False) -> Iterator[RenderableType]:
    """Yield what matters, or all of it."""
    checks = list(_checks(verification))
    if checks:
        yield from checks_view(checks, verbose=verbose)
    yield heading("Compared")
    yield facts(_compared(verification, verbose=verbose))
    if verification.few_bits:
        yield heading(f"With weights of {verification.few_bits.bits} bits, original → fused")
        yield facts(few_bits_lines(verification.few_bits, shown=None if verbose else LAYERS_SHOWN))
    yield from notes(verification.notes)
    word, style = VERDICTS[verification.verdict]
    yield Text.assemble("\n", (word, style), f" {verification.reason}")


def _checks(verification: Verification) -> Iterator[Check]:
    """Yield the proof where there is one, then both networks as they are stored, and the drift."""
    proof = verification.proof
    if proof:
        yield from of_proof(proof)
    yield from of_stored(verification.outputs)
    if proof:
        yield from of_site_drift(proof)
    if verification.drift:
        yield from of_drift(verification.drift)


def _compared(verification: Verification, *, verbose: bool) -> Iterator[tuple[str, RenderableType]]:
    original, fused = verification.dtypes
    if verbose or original != fused:
        yield "dtypes", original if original == fused else f"{original} and {fused}"
    compared = [trial for trial in verification.trials if not trial.skipped]
    shapes = dict.fromkeys(", ".join(map(shape, trial.shapes)) for trial in compared)
    sizes = f": {'; '.join(shapes)}" if verbose else f" of {plural(len(shapes), 'shape')}"
    yield "inputs", f"{plural(len(compared), 'input')}{sizes}" if compared else "none"
    skipped = [trial for trial in verification.trials if trial.skipped]
    if skipped:
        yield "refused", f"{plural(len(skipped), 'input')} that not both networks are for ({skipped[0].skipped})"
    for trial in compared:
        if trial.mismatch:
            yield "mismatch", f"{trial.label}: {trial.mismatch}"
    for output in verification.outputs if verbose else ():
        yield "tolerances", _tolerances(output.error)
    if verification.data:
        yield from data_lines(verification.data)
    if verification.first_difference:
        yield "first differs", _parting(verification.first_difference)


def _tolerances(output: OutputError) -> str:
    """Return the smallest tolerances, one of them alone, that would pass in float64."""
    relative = "" if output.smallest_rtol is None else f" or rtol {error(output.smallest_rtol)}"
    return f"{output.name} agrees within atol {error(output.max_abs)}{relative}, of numbers up to {output.scale:.3g}"


def data_lines(data: RealData) -> Iterator[tuple[str, str]]:
    """Yield what both networks say of real inputs: how often they agree, how often they are right, where they flip."""
    compared = "" if data.compared == data.samples else f", {data.compared} of them also in float64"
    yield "real data", f"{plural(data.samples, 'sample')}{compared}"
    if data.top1_agreement is not None:
        yield "top-1", f"the same class for {percent(data.top1_agreement)} of the samples"
    if data.top5_agreement is not None:
        yield "top-5", f"the same five classes for {percent(data.top5_agreement)} of the samples"
    if data.accuracy_original is not None:
        yield "accuracy", f"original {percent(data.accuracy_original)}, fused {percent(data.accuracy_fused)}"
    if data.top5_accuracy_original is not None:
        both = f"original {percent(data.top5_accuracy_original)}, fused {percent(data.top5_accuracy_fused)}"
        yield "top-5 accuracy", both
    if data.without_class:
        yield "no class", f"{plural(data.without_class, 'sample')} with outputs that are not a number"
    if data.flips and data.flips.samples:
        yield "flips", _flips(data.flips)
    if data.flips and data.flips.first:
        more = data.flips.samples - len(data.flips.first)
        yield "flipped", "; ".join([*map(_flip, data.flips.first), *([f"and {more} more"] if more else [])])


LAYERS_SHOWN = 3


def few_bits_lines(found: FewBits, shown: int | None = LAYERS_SHOWN) -> Iterator[tuple[str, str]]:
    """Yield what rounded weights do to the outputs of both networks, and which layers cost most."""
    for way in found.ways:
        levels = change(decibels(way.original), decibels(way.fused))
        accuracies = change(percent(way.accuracy_original), percent(way.accuracy_fused))
        right = "" if way.accuracy_fused is None else f", accuracy {accuracies}"
        yield f"per {way.per}", f"signal to noise {levels} dB{right}"
    worst = [f"{each.path} ({decibels(each.level)} dB)" for each in found.layers[:shown]]
    yield "costs most", f"{', '.join(worst)}: each layer alone, per tensor" if worst else ""
    yield "rounded", f"{change(*map(str, found.weights))} weights; on {found.trial}, in float64"


def _flips(flips: Flips) -> str:
    known = flips.right_to_wrong is not None
    turned = f" ({flips.right_to_wrong} right to wrong, {flips.wrong_to_right} wrong to right)" if known else ""
    margins = dict.fromkeys((error(flips.smallest_margin), error(flips.largest_margin)))
    preferred = f"the original preferred its own by {' to '.join(margins)} of its largest output there"
    return f"{plural(flips.samples, 'sample')} in another class{turned}; {preferred}"


def _flip(flip: Flip) -> str:
    label = "" if flip.label is None else f" (it is {flip.label})"
    return f"{flip.sample}: {flip.original} → {flip.fused}{label}"


def _parting(difference: FirstDifference) -> str:
    found, allowed = difference.error.against(difference.allowed)
    after = f", after {difference.after}, which still agrees" if difference.after else ""
    return (
        f"at {difference.path or 'the root'}{after}: {difference.unit} {found} (allowed {allowed}, {difference.trial})"
    )
