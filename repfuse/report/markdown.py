"""The page as a comment on a pull request: ten lines, and the rest folded away. GitHub takes 65,536 characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from repfuse.benching.results import Measurement
from repfuse.plans import Site
from repfuse.report.bench_view import speedup, where
from repfuse.report.page import Page, counted, share
from repfuse.report.schema import Told
from repfuse.report.tables import duration, plural
from repfuse.wording import printable

TIMES_SHOWN = 2
ROWS_SHOWN = 30
TEXT_SHOWN = 300
MARKS = re.compile(r"([\\`*_{}\[\]<>#|~&!$@])")


def as_markdown(told: Told) -> str:
    """Return the comment."""
    page = Page(told)
    return "\n".join([*_summary(page), "", *_folded(page), ""])


def _summary(page: Page) -> Iterator[str]:
    yield f"**{text(page.name)}**: {page.word}. {text(page.verdict)}"
    yield ""
    yield from _table(("", "before", "after", ""), "lrrr", _changes(page))


def _changes(page: Page) -> Iterator[Sequence[str]]:
    for name, before, after, changed, _ in page.amounts:
        yield name, before, after, changed
    for row in page.speeds[:TIMES_SHOWN]:
        yield text(where(row)), *_times(row), speedup(row)


def _times(row: Measurement) -> tuple[str, str]:
    return duration(row.original.median), duration(row.fused.median)


def _formula(site: Site) -> str:
    branches = (f"{times} of {branch}" if times > 1 else branch for branch, times in counted(site.branches))
    return f"{' | '.join(branches)} → {site.kernel}"


def _folded(page: Page) -> Iterator[str]:
    plan = page.told.plan
    yield f"<details><summary>{plural(len(plan.sites), 'site')}, {plural(len(plan.refusals), 'refusal')}</summary>"
    yield ""
    if page.speeds:
        rows = ((text(where(row)), *_times(row), speedup(row), share(row)) for row in page.speeds)
        yield from (*_table(("", "before", "after", "", "of a matrix product's speed"), "lrrrr", rows), "")
    if page.kinds:
        rows = ((str(len(sites)), code(_formula(sites[0])), *page.numbers(sites)) for sites in page.kinds)
        yield from (*_table(("sites", "formula", "predicted", "measured", "error"), "rlrrr", rows), "")
    if page.refused:
        refusals = ((each.code, places, code(place), text(each.hint)) for each, places, place, _ in page.refused)
        yield from (*_table(("not merged", "", "where", "what to do"), "llll", refusals), "")
    said = [*page.health, *(("timing", each) for each in page.untimed), *page.agreement(), *page.few_bits]
    facts = [(text(name), text(value)) for name, value in said]
    made = (*page.environment, ("made by", page.told.conversion.command))
    yield from _table(("", ""), "ll", [*facts, *((name, code(value)) for name, value in made if value)])
    yield ""
    yield "</details>"


def _table(titles: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table, without the columns that have nothing in them."""
    known = list(rows)
    kept = [number for number in range(len(titles)) if any(row[number] for row in known)]
    yield _row(titles[number] for number in kept)
    yield _row({"l": "---", "r": "---:"}[sides[number]] for number in kept)
    yield from (_row(row[number] for number in kept) for row in known[:ROWS_SHOWN])
    if len(known) > ROWS_SHOWN:
        yield _row([f"and {len(known) - ROWS_SHOWN} more", *("" for _ in kept[1:])])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text(said: str) -> str:
    """Return a text in which no character is a mark, and nobody is called."""
    return MARKS.sub(r"\\\1", _clipped(said)).replace("@", "@\u200b")


def code(said: str) -> str:
    """Return a text as code, for a table: between more backticks than it has in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", said)), default=0))
    space = " " if "`" in said else ""
    return f"{fence}{space}{_clipped(said)}{space}{fence}".replace("|", "\\|") if said else ""


def _clipped(said: str) -> str:
    line = " ".join(printable(said).split())
    return line if len(line) <= TEXT_SHOWN else f"{line[:TEXT_SHOWN]}..."
