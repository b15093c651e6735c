"""Weights that look wrong, for people: each kind once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType

from repfuse.health import MEANINGS, Ailment, Finding
from repfuse.report.tables import facts, heading

PLACES_SHOWN = 4
ORDER: list[Ailment] = list(MEANINGS)


def health_view(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Yield each kind of finding with what it means and where; nothing where all weights are well."""
    if not findings:
        return
    yield heading("Weights that look wrong")
    ordered = sorted(findings, key=lambda finding: ORDER.index(finding.what))
    kinds = groupby(ordered, key=lambda finding: finding.what)
    yield facts([(kind, f"{MEANINGS[kind]}; {_places(list(group))}") for kind, group in kinds])


def _places(findings: Sequence[Finding]) -> str:
    names = ", ".join(f"{finding.name} ({finding.count} of {finding.of})" for finding in findings[:PLACES_SHOWN])
    more = len(findings) - PLACES_SHOWN
    return names + (f" and {more} more (--json lists all)" if more > 0 else "")
