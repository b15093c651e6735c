"""A verification for people: every check on a line, the errors of each output, real data, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import RenderableType
from rich.text import Text

from repfuse.checking.results import (
    Comparison,
    Drift,
    FewBits,
    FirstDifference,
    Flips,
    OutputVerdict,
    Proof,
    RealData,
    Verification,
    WeightProof,
)
from repfuse.report.tables import (
    BAD,
    GOOD,
    NOTHING,
    NUMBER,
    UNSURE,
    alone,
    change,
    decibels,
    error,
    facts,
    heading,
    indented,
    notes,
    percent,
    plural,
    shape,
    table,
)
from repfuse.wording import apart, small

OUTPUTS_SHOWN = 4
"""As many as one reads; --json has all."""


class Check(NamedTuple):
    """One line: of what, how far off, how far it may be, and where it was ``worst``.

    ``own`` is the original's error there, where it has one too; the numbers are relative to the whole output.
    """

    level: str
    what: str
    worst: str
    error: str
    allowed: str
    passed: bool
    own: str = ""


def checks_view(checks: Sequence[Check], *, verbose: bool) -> Iterator[RenderableType]:
    """Yield the checks as a table, and where each was worst: of those that fail, or of all."""
    yield heading("Checks")
    verdicts = ("FAILED", "passed")
    rows = [(row.level, row.what, row.error, row.allowed, verdicts[row.passed]) for row in checks]
    yield table(("Check", "Of what", ("Error", NUMBER), ("Allowed", NUMBER), ""), rows)
    for row in checks:
        if row.worst and (verbose or not row.passed):
            own = f"; the original's own error there is {row.own}" if row.own else ""
            yield indented(f"{row.level}, {row.what}: worst: {row.worst}{own}")


def of_proof(proof: Proof) -> Iterator[Check]:
    """Yield what was proven in float64: the sites, their stored weights, and the whole network."""
    if proof.sites:
        worst = max(proof.sites, key=lambda site: (not site.comparison.passed, site.error or 0.0))
        found, passed = worst.comparison.worst, all(site.comparison.passed for site in proof.sites)
        place = f"{worst.path}, {found[0].label}" if found else worst.path
        reached, allowed = apart(worst.error or 0.0, worst.tolerance)
        reached = NOTHING if worst.error is None else reached
        yield Check("proof, float64", alone(len(proof.sites)), place, reached, allowed, passed)
        yield from _weights([weight for site in proof.sites for weight in site.weights])
    yield from of_network(proof.network)
    if proof.unproven:
        yield Check("proof", "the rest of the network", ", ".join(proof.unproven[:3]), NOTHING, "equal", False)


def _weights(weights: list[WeightProof]) -> Iterator[Check]:
    if not weights:
        return
    worst, wrong = max(weights, key=lambda each: (each.wrong > 0, each.spacings)), sum(each.wrong for each in weights)
    place = f"{worst.name}, {wrong} wrong" if wrong else ""
    what = plural(len(weights), "stored tensor")
    yield Check("proof, float64", what, place, f"{worst.spacings:.2g} ulp", "0.5 ulp", not wrong)


def of_network(network: Comparison, which: str = "the whole network") -> Iterator[Check]:
    """Yield the comparison in float64 of a network, ``which`` it is, with the original, a line per output."""
    level = "proof, float64" if not network.narrow else "mixed dtypes" if all(network.narrow) else "as stored"
    for row in network.mismatches[:1]:
        yield Check(level, which, f"{row.label}: {row.mismatch}", NOTHING, "", False)
    whole = f"{which} on {plural(len(network.compared), 'input')}"
    ordered = sorted(network.by_output, key=lambda entry: -entry[1].relative.max)
    for trial, output in ordered[:OUTPUTS_SHOWN]:
        numbers, passed = apart(output.relative.max, network.tolerance), output.relative.max <= network.tolerance
        yield Check(level, _of_output(output.name, len(ordered), whole), trial.label, *numbers, passed)


def of_site_drift(proof: Proof) -> Iterator[Check]:
    """Yield the drift of the sites, each alone, against the bound of the arithmetic."""
    drifts = [(site.path, site.drift) for site in proof.sites if site.drift]
    if drifts:
        path, worst = max(drifts, key=lambda entry: entry[1].of_bound)
        passed = all(drift.passed for _, drift in drifts)
        reached, bound = apart(worst.of_bound, 1.0, "{:.2g}".format)
        place = f"{path}, {worst.trial}"
        yield Check(f"drift, {worst.dtype}", alone(len(drifts)), place, reached, f"{bound} x bound", passed)


def of_drift(drift: Drift) -> Iterator[Check]:
    """Yield the drift of the whole network, a line per output."""
    if drift.problem and drift.measured:
        yield Check("drift", "the whole network", drift.problem, NOTHING, "", False)
    worst = sorted(drift.by_output.values(), key=lambda output: -output.used)
    for output in worst[:OUTPUTS_SHOWN]:
        of_what = _of_output(output.name, len(worst), "the whole network")
        numbers, own = output.fused.against(output.allowed), small(output.numbers[1])
        yield Check(f"drift, {output.dtype}", of_what, output.trial, *numbers, output.passed, own)


def _of_stored(outputs: tuple[OutputVerdict, ...]) -> Iterator[Check]:
    """Yield the comparison in float64 of two networks with their weights as they are stored, a line per output."""
    ordered = sorted(outputs, key=lambda row: -row.error.relative.over(row.allowed))
    for output in ordered[:OUTPUTS_SHOWN]:
        off, of_what = output.error.relative, _of_output(output.name, len(outputs), "weights as stored")
        yield Check("float64", of_what, output.trial, *off.against(output.allowed), not off.exceeds(output.allowed))


def _of_output(name: str, outputs: int, whole: str) -> str:
    return whole if outputs == 1 else f"{whole}, {name}"


VERDICTS = {"same": ("Same.", GOOD), "different": ("Different.", BAD), "could-not-tell": ("Could not tell.", UNSURE)}


def verify_view(verification: Verification, *, verbose: bool = False) -> Iterator[RenderableType]:
    """Yield what matters, or all of it."""
    proof, drift = verification.proof, verification.drift
    checks = [*(of_proof(proof) if proof else ()), *_of_stored(verification.outputs)]
    checks += [*(of_site_drift(proof) if proof else ()), *(of_drift(drift) if drift else ())]
    yield from checks_view(checks, verbose=verbose) if checks else ()
    yield heading("Compared")
    yield facts(_compared(verification, verbose=verbose))
    if verification.few_bits:
        yield heading(f"With weights of {verification.few_bits.bits} bits, original → fused")
        yield facts(few_bits_lines(verification.few_bits, shown=None if verbose else LAYERS_SHOWN))
    yield from notes(verification.notes)
    word, style = VERDICTS[verification.verdict]
    yield Text.assemble("\n", (word, style), f" {verification.reason}")


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
    for row in verification.outputs if verbose else ():
        off, relative = row.error, row.error.smallest_rtol
        or_rtol = "" if relative is None else f" or rtol {error(relative)}"  # each, without the other, would pass
        within = f"atol {error(off.max_abs)}{or_rtol}, of numbers up to {off.scale:.3g}"
        yield "tolerances", f"{off.name} agrees within {within}"
    if verification.data:
        yield from data_lines(verification.data)
    if verification.first_difference:
        yield "first differs", _parting(verification.first_difference)


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
        flips = [
            f"{flip.sample}: {flip.original} → {flip.fused}" + ("" if flip.label is None else f" (it is {flip.label})")
            for flip in data.flips.first
        ]
        yield "flipped", "; ".join([*flips, *([f"and {more} more"] if more else [])])


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


def _parting(difference: FirstDifference) -> str:
    found, allowed = difference.error.against(difference.allowed)
    after = f", after {difference.after}, which still agrees" if difference.after else ""
    return (
        f"at {difference.path or 'the root'}{after}: {difference.unit} {found} (allowed {allowed}, {difference.trial})"
    )
