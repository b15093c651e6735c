"""The plan for people: what is merged into what, and what is not and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from repfuse.globs import ROOT
from repfuse.health import MEANINGS, Ailment, Finding
from repfuse.plans import Cost, Plan, Policy, Refusal, Site
from repfuse.quantization import BITS, SiteKernels, failing, needed, together
from repfuse.refusals import Explanation
from repfuse.report.tables import NUMBER, change, count, decibels, facts, first, heading, indented, plural, table
from repfuse.topics import Topic


def health_rows(findings: Iterable[Finding], shown: Callable[[list[str]], str]) -> list[tuple[str, str]]:
    """Return each kind of finding, weights that look wrong, with what it means and where, as far as ``shown``."""
    found = defaultdict[Ailment, list[str]](list)
    for each in findings:
        found[each.what].append(f"{each.name} ({each.count} of {each.of})")
    return [(what, f"{MEANINGS[what]}; {shown(names)}") for what, names in found.items()]


def health_view(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Yield each kind of finding once; nothing where all weights are well."""
    if findings:
        yield heading("Weights that look wrong")
        order = list(MEANINGS)
        yield facts(health_rows(sorted(findings, key=lambda each: order.index(each.what)), first))


# What rounding to few bits leaves of the kernels.


def int8_line(sites: Sequence[SiteKernels], few: Sequence[int] = BITS) -> str:
    """Return what the first of ``few`` bits leave with which a site has less than it needs; nothing for none."""
    for bits in few:
        if bad := failing(sites, bits):
            whole = decibels(together([site.after.at(bits).per_tensor for site in sites]))
            names = first([site.path or ROOT for site in bad])
            return f"{bits} bits per tensor leave about {whole} dB of signal to noise; worst: {names}"
    return ""


def int8_view(sites: Sequence[SiteKernels]) -> Iterator[RenderableType]:
    """Yield the kernels, those that rounding hurts most first."""
    if not sites:
        return
    yield heading("Kernels with few bits, before → after (`repfuse explain int8`)")
    titles = [(title, NUMBER) for bits in BITS for title in (f"{bits} bits", "by channel")]
    yield table(["Site", ("Range", NUMBER), *titles], map(int8_row, sites))
    enough = decibels(needed(len(sites)))
    yield indented(
        f"Range: the largest channel's over the median's. Then the signal-to-noise of the rounded weights in dB, each "
        f"channel counting alike, in steps of the whole tensor or by channel; {enough} is enough. Before: the weight "
        f"that {BITS[0]} bits hurt most of those that the site replaces, as it is stored."
    )


def int8_row(site: SiteKernels) -> tuple[str, ...]:
    """Return a site's row: path, spread of the ranges, and what is left with each of BITS, per tensor and channel."""
    both = site.before, site.after
    levels = [
        change(*(decibels(getattr(kernel.at(bits), way)) for kernel in both))
        for bits in BITS
        for way in ("per_tensor", "per_channel")
    ]
    return site.path or ROOT, change(*(f"{kernel.spread:.1f}" for kernel in both)), *levels


def plan_view(plan: Plan, *, verbose: bool = False) -> Iterator[RenderableType]:
    """Yield the sites with their costs, and the refusals by code.

    Each path stands on a line of its own, so that no terminal breaks it; of several sites, their sum comes last.
    """
    if plan.sites:
        yield heading("Sites")
    for site in plan.sites:
        yield indented(site.path or ROOT)
        yield indented(f"{merged(site)}; {_costs(site.before, site.after, macs=verbose)}", 4)
    if len(plan.sites) > 1:
        total_of_all = _costs(*totals(plan.sites))
        yield indented(Text(f"{plural(len(plan.sites), 'site')}: {total_of_all}", style="bold"))
    yield from refusals_view(plan.refusals)


def summary(plan: Plan) -> str:
    """Return one line: ``5 sites, 31 → 5 operators; 2 refusals``."""
    found = f"{plural(len(plan.sites), 'site')}, {operators(plan)}" if plan.sites else "no site"
    policy = "" if plan.policy == Policy.COST else f", policy {plan.policy}"
    return f"{found}; {plural(len(plan.refusals), 'refusal')}{policy}"


def operators(plan: Plan) -> str:
    """Return how many operators the sites come to, before and after: ``31 → 5 operators``."""
    return _operators(*totals(plan.sites))


def merged(site: Site) -> str:
    """Return the branches of a site and the convolution that they become; equal branches are counted."""
    branches = (f"{times} of ({name})" if times > 1 else name for name, times in Counter(site.branches).items())
    return f"{', '.join(branches)} → {site.kernel}"


def refusals_view(refusals: Sequence[Refusal], title: str = "Not fused") -> Iterator[RenderableType]:
    """Yield each kind of refusal once: how often, why, where and what to do."""
    if not refusals:
        return
    yield heading(title)
    ordered = sorted(refusals, key=lambda refusal: (refusal.code, refusal.reason))
    for (code, reason), group in groupby(ordered, key=lambda refusal: (refusal.code, refusal.reason)):
        same = list(group)
        yield indented(Text.assemble((code, "bold yellow"), f"  {plural(len(same), 'place')}"))
        rows = [
            ("why", reason),
            ("where", first([refusal.where for refusal in same])),
            ("cost", declined(same)),
            ("do", same[0].hint),
        ]
        yield Padding(facts(rows), (0, 0, 1, 2))


def declined(refusals: Sequence[Refusal]) -> str:
    """Return what the refused places cost as they are, and what they would cost merged, as far as that is known."""
    known = [(refusal.before, refusal.after) for refusal in refusals if refusal.before and refusal.after]
    if not known:
        return ""
    return _costs(total(before for before, _ in known), total(after for _, after in known))


def refusals_line(refusals: Sequence[Refusal]) -> str:
    """Return how many places were refused for what: ``cost (2), shift-before-padding (1)``."""
    return ", ".join(f"{code} ({times})" for code, times in Counter(refusal.code for refusal in refusals).most_common())


def _costs(before: Cost, after: Cost, *, macs: bool = True) -> str:
    of_macs = f", {change(count(before.macs), count(after.macs))} multiply-accumulates" if macs else ""
    return _operators(before, after) + of_macs


def _operators(before: Cost, after: Cost) -> str:
    return f"{change(count(before.launches), count(after.launches))} operators"


def totals(sites: Sequence[Site]) -> tuple[Cost, Cost]:
    """Return what the sites cost together, before and after."""
    return total(site.before for site in sites), total(site.after for site in sites)


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs."""
    return sum(costs, start=Cost())


# What a topic tells, what a refusal code means, and the list of both.


def explain_view(code: str, explanation: Explanation) -> Iterator[RenderableType]:
    """Yield the meaning of one code and what to do."""
    yield Text.assemble((code, "bold yellow"), f": {explanation.title}")
    yield Padding(facts([("meaning", explanation.meaning), ("do", explanation.hint)]), (1, 0, 0, 0))


def topic_view(name: str, topic: Topic) -> Iterator[RenderableType]:
    """Yield what one topic tells."""
    yield Text.assemble((name, "bold yellow"), f": {topic.title}")
    yield Padding(Text(topic.opening), (1, 0))
    yield facts(topic.points.items())


def list_view(topics: Mapping[str, Topic], codes: Mapping[str, Explanation]) -> Iterator[RenderableType]:
    """Yield every topic and every code with its title."""
    yield heading("Topics")
    yield facts((name, topics[name].title) for name in topics)
    yield heading("Refusals")
    yield facts((code, codes[code].title) for code in sorted(codes))
