"""The plan for people: what is merged into what, and what is not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from repfuse.globs import ROOT
from repfuse.health import MEANINGS, Ailment, Finding
from repfuse.plans import Cost, Plan, Policy, Refusal, Site
from repfuse.report.tables import NUMBER, change, count, facts, heading, places, plural, table

# Weights that look wrong, for people: each kind once.


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


def plan_view(plan: Plan) -> Iterator[RenderableType]:
    """Yield the sites with their costs, and the refusals by code."""
    yield from sites_view(plan.sites)
    yield from refusals_view(plan.refusals)


def summary(plan: Plan) -> str:
    """Return one line: ``5 sites, 31 → 5 operators, 1.2 M → 1.0 M multiply-accumulates; 2 refusals``."""
    before, after = _total(site.before for site in plan.sites), _total(site.after for site in plan.sites)
    parts = [plural(len(plan.sites), "site")]
    if plan.sites:
        parts.append(f"{change(count(before.launches), count(after.launches))} operators")
        parts.append(f"{change(count(before.macs), count(after.macs))} multiply-accumulates")
    policy = "" if plan.policy == Policy.COST else f", policy {plan.policy}"
    return ", ".join(parts) + f"; {plural(len(plan.refusals), 'refusal')}{policy}"


def sites_view(sites: Sequence[Site]) -> Iterator[RenderableType]:
    """Yield the table of sites; with more than one, its last row is their sum."""
    if not sites:
        return
    rows = [(site.path or ROOT, merged(site), *_costs(site.before, site.after)) for site in sites]
    if len(sites) > 1:
        totals = (_total(site.before for site in sites), _total(site.after for site in sites))
        rows.append((plural(len(sites), "site"), "", *_costs(*totals)))
    yield heading("Sites")
    columns = ("Where", "What becomes one convolution", ("MACs", NUMBER), ("Operators", NUMBER))
    yield table(columns, rows, total=len(sites) > 1)


def merged(site: Site) -> str:
    """Return the branches of a site and the convolution that they become; equal branches are counted."""
    branches = (f"{times} of ({name})" if times > 1 else name for name, times in Counter(site.branches).items())
    return f"{', '.join(branches)} → {site.kernel}"


def refusals_view(refusals: Sequence[Refusal]) -> Iterator[RenderableType]:
    """Yield each kind of refusal once: how often, why, where and what to do."""
    if not refusals:
        return
    yield heading("Not fused")
    ordered = sorted(refusals, key=lambda refusal: (refusal.code, refusal.reason))
    for (code, reason), group in groupby(ordered, key=lambda refusal: (refusal.code, refusal.reason)):
        same = list(group)
        title = Text.assemble((code, "bold yellow"), f"  {plural(len(same), 'place')}")
        yield Padding(title, (0, 0, 0, 2))
        rows = [
            ("why", reason),
            ("where", places([refusal.where for refusal in same])),
            ("cost", _declined(same)),
            ("do", same[0].hint),
        ]
        yield Padding(facts(rows), (0, 0, 1, 2))


def _declined(refusals: Sequence[Refusal]) -> str:
    known = [(refusal.before, refusal.after) for refusal in refusals if refusal.before and refusal.after]
    if not known:
        return ""
    macs, operators = _costs(_total(before for before, _ in known), _total(after for _, after in known))
    return f"{macs} multiply-accumulates, {operators} operators"


def _costs(before: Cost, after: Cost) -> tuple[str, str]:
    macs = change(count(before.macs), count(after.macs))
    return macs, change(count(before.launches), count(after.launches))


def _total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, start=Cost())
