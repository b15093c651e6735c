"""Weights that look wrong, for people: each kind once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType

from repfuse.health import MEANINGS, Ailment, Finding
from repfuse.report.tables import facts, heading, places

ORDER: list[Ailment] = list(MEANINGS)


def health_view(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Yield each kind of finding with what it means and where; nothing where all weights are well."""
    if not findings:
        return
    yield heading("Weights that look wrong")
    ordered = sorted(findings, key=lambda finding: ORDER.index(finding.what))
    kinds = groupby(ordered, key=lambda finding: finding.what)
    yield facts([(kind, f"{MEANINGS[kind]}; {places([_line(finding) for finding in group])}") for kind, group in kinds])


def _line(finding: Finding) -> str:
    return f"{finding.name} ({finding.count} of {finding.of})"
