"""Every check on a line: of what, where it was worst, how far off, and how far it may be. It reads in ten seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from repfuse.report.tables import NOTHING, NUMBER, alone, heading, plural, table
from repfuse.wording import apart, small

if TYPE_CHECKING:
    from repfuse.checking.results import Comparison, Drift, OutputVerdict, Proof, SiteProof, WeightProof

T = TypeVar("T")
OUTPUTS_SHOWN = 4
PASSED, FAILED = "passed", "FAILED"
COLUMNS = ("Check", "Of what", ("Error", NUMBER), ("Allowed", NUMBER), "")


@dataclass(frozen=True)
class Check:
    """One line. ``own`` is the original's error, where it has one too; the numbers are relative to the whole output."""

    level: str
    what: str
    worst: str
    error: str
    allowed: str
    passed: bool
    own: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        verdict = PASSED if self.passed else FAILED
        return self.level, self.what, self.error, self.allowed, verdict

    @property
    def detail(self) -> str:
        """Where it was worst, and the original's own error."""
        own = f"; the original's own error there is {self.own}" if self.own else ""
        return f"worst: {self.worst}{own}" if self.worst else ""


def checks_view(checks: Sequence[Check], *, verbose: bool) -> Iterator[RenderableType]:
    """Yield the checks as a table, and where each was worst: of those that fail, or of all."""
    yield heading("Checks")
    yield table(COLUMNS, [check.cells for check in checks])
    told = [check for check in checks if check.detail and (verbose or not check.passed)]
    for check in told:
        yield Padding(Text(f"{check.level}, {check.what}: {check.detail}"), (0, 0, 0, 2))


def of_proof(proof: Proof) -> Iterator[Check]:
    """Yield what was proven in float64: the sites, their stored weights, and the whole network."""
    if proof.sites:
        yield _sites(proof.sites)
        yield from _weights([weight for site in proof.sites for weight in site.weights])
    yield from _network(proof.network)
    if proof.unproven:
        yield Check("proof", "the rest of the network", ", ".join(proof.unproven[:3]), NOTHING, "equal", False)


def of_site_drift(proof: Proof) -> Iterator[Check]:
    """Yield the drift of the sites, each alone, against the bound of the arithmetic."""
    drifts = [(site.path, site.drift) for site in proof.sites if site.drift]
    if drifts:
        path, worst = max(drifts, key=lambda entry: entry[1].of_bound)
        passed = all(drift.passed for _, drift in drifts)
        what = alone(len(drifts))
        reached, bound = apart(worst.of_bound, 1.0, "{:.2g}".format)
        place = f"{path}, {worst.trial}"
        yield Check(f"drift, {worst.dtype}", what, place, reached, f"{bound} x bound", passed)


def of_drift(drift: Drift) -> Iterator[Check]:
    """Yield the drift of the whole network, a line per output."""
    if drift.problem and drift.measured:
        yield Check("drift", "the whole network", drift.problem, NOTHING, "", False)
    worst = sorted(drift.by_output.values(), key=lambda output: -output.used)
    for output in _shown(worst):
        of_what = _of_output(output.name, len(worst), "the whole network")
        numbers, own = output.fused.against(output.allowed), small(output.numbers[1])
        yield Check(f"drift, {output.dtype}", of_what, output.trial, *numbers, output.passed, own)


def of_stored(outputs: tuple[OutputVerdict, ...]) -> Iterator[Check]:
    """Yield the comparison in float64 of two networks with their weights as they are stored, a line per output."""
    ordered = sorted(outputs, key=lambda row: -row.error.relative.over(row.allowed))
    for output in _shown(ordered):
        numbers = output.error.relative.against(output.allowed)
        of_what = _of_output(output.name, len(outputs), "weights as stored")
        yield Check("float64", of_what, output.trial, *numbers, not output.error.relative.exceeds(output.allowed))


def _sites(sites: tuple[SiteProof, ...]) -> Check:
    worst = max(sites, key=lambda site: (not site.comparison.passed, site.error or 0.0))
    found = worst.comparison.worst
    place = f"{worst.path}, {found[0].label}" if found else worst.path
    passed = all(site.comparison.passed for site in sites)
    reached, allowed = apart(worst.error or 0.0, worst.tolerance)
    if worst.error is None:
        reached = NOTHING
    return Check("proof, float64", alone(len(sites)), place, reached, allowed, passed)


def _weights(weights: list[WeightProof]) -> Iterator[Check]:
    if not weights:
        return
    worst = max(weights, key=lambda weight: (weight.wrong > 0, weight.spacings))
    wrong = sum(weight.wrong for weight in weights)
    place = f"{worst.name}, {wrong} wrong" if wrong else ""
    what = plural(len(weights), "stored tensor")
    yield Check("proof, float64", what, place, f"{worst.spacings:.2g} ulp", "0.5 ulp", not wrong)


def of_equalized(network: Comparison) -> Iterator[Check]:
    """Yield the comparison in float64 of the original with the network that was equalised, before it was rounded."""
    yield from _network(network, "equalised")


def _network(network: Comparison, which: str = "the whole network") -> Iterator[Check]:
    level = "proof, float64" if not network.narrow else "mixed dtypes" if all(network.narrow) else "as stored"
    for row in network.mismatches[:1]:
        yield Check(level, which, f"{row.label}: {row.mismatch}", NOTHING, "", False)
    whole = f"{which} on {plural(len(network.compared), 'input')}"
    ordered = sorted(network.by_output, key=lambda entry: -entry[1].relative.max)
    for trial, output in _shown(ordered):
        numbers = apart(output.relative.max, network.tolerance)
        passed = output.relative.max <= network.tolerance
        of_what = _of_output(output.name, len(ordered), whole)
        yield Check(level, of_what, trial.label, *numbers, passed)


def _of_output(name: str, outputs: int, whole: str) -> str:
    return whole if outputs == 1 else f"{whole}, {name}"


def _shown(rows: Sequence[T]) -> Sequence[T]:
    """Return as many as one reads; --json has all."""
    return rows[:OUTPUTS_SHOWN]
