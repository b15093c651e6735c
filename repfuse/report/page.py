"""The report of a conversion as a page that people forward: what it says, and that as HTML and as Markdown.

The page has no script and fetches nothing. What files say (names of modules, paths, reasons) is text in it, never
markup.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import log
from pathlib import Path
from typing import Any

from repfuse.benching.results import Measurement, SiteTiming
from repfuse.errors import RepfuseError
from repfuse.planning.cost import price
from repfuse.plans import ROOT, Refusal, Site
from repfuse.quantization import SiteKernels
from repfuse.report.bench_view import gain, speed, speedup, where
from repfuse.report.convert_view import (
    achieved,
    chosen_line,
    declined,
    example_line,
    gain_line,
    health_rows,
    int8_line,
    int8_row,
    name_of,
    operators,
    totals,
    verified_line,
)
from repfuse.report.schema import Status, Told
from repfuse.report.tables import NOTHING, alone, change, count, duration, error, interval, percent, plural, size, times
from repfuse.report.verify_view import data_lines, few_bits_lines
from repfuse.wording import listed, printable

OPEN_SITES = 40
"""More sites than these are folded away until somebody unfolds them."""

KERNELS_SHOWN = 12
"""Those that rounding hurts most; the report has all."""

WORDS: dict[Status, str] = {
    "converted": "Converted",
    "failed": "Not converted",
    "nothing-to-fuse": "Nothing to fuse",
    "planned": "Planned",
}
Pair = tuple[str, str]


@dataclass(frozen=True)
class Page:
    """What the page says, in its order."""

    told: Told

    @property
    def name(self) -> str:
        """The network."""
        return name_of(self.told.conversion.input)

    @property
    def tone(self) -> str:
        """Whether it is good news: ``good``, ``bad`` or ``unsure``."""
        status, later = self.told.conversion.status, self.told.verification
        if status == "failed" or (later and later.verdict == "different"):
            return "bad"
        slower = bool(self.speeds) and self.speeds[0].verdict == "slower"
        return "unsure" if status != "converted" or slower or (later and later.verdict != "same") else "good"

    @property
    def word(self) -> str:
        """What was done, in a word or two."""
        return WORDS[self.told.conversion.status]

    @property
    def verdict(self) -> str:
        """What changed, how exact it is, and how much faster, in a line."""
        conversion, later = self.told.conversion, self.told.verification
        if conversion.status == "failed":
            reason = conversion.proof.reason if conversion.proof and not conversion.proof.passed else ""
            return f"The check failed, and nothing was written. {reason}".rstrip()
        plan, proof, equalized = self.told.plan, conversion.proof, conversion.equalization
        if not plan.sites and not (equalized and equalized.tensors):
            return "No place can be merged." if plan.refusals else "There is nothing that could be merged."
        parts = achieved(plan, equalized, [proof.error] if proof else [])
        if self.speeds:
            parts.append(f"{speed(self.speeds[0])} at {where(self.speeds[0])}")
        if later and later.data and later.data.accuracy_original is not None:
            both = percent(later.data.accuracy_original), percent(later.data.accuracy_fused)
            parts.append(f"accuracy {change(*both)}")
        found = "" if not later or later.verdict == "same" else f" But `repfuse verify`: {later.reason}"
        return ", ".join(parts) + "." + found

    @cached_property
    def speeds(self) -> list[Measurement]:
        """The rows of the chart."""
        return [each for timing in self.told.timings for each in timing.measurements]

    @property
    def untimed(self) -> list[str]:
        """Which runtimes were left out, and what looked odd."""
        left_out = [f"not timed in {why}" for timing in self.told.timings for why in timing.left_out]
        odd = defaultdict[str, list[str]](list)
        for row in self.speeds:
            for each in row.warnings:
                odd[each].append(where(row))
        return left_out + [f"{'; '.join(labels)}: {warning}" for warning, labels in odd.items()]

    @property
    def timed_on(self) -> str:
        """Which device and dtype the times are of."""
        return listed(dict.fromkeys(f"{timing.device}, {timing.dtype}" for timing in self.told.timings))

    @property
    def amounts(self) -> list[tuple[str, str, str, str, float]]:
        """What there is before and after, each with the change and the share that is left."""
        before, after = totals(self.told.plan.sites)
        rows = [("operators at the sites", count, before.launches, after.launches)]
        for timing in self.told.timings[:1]:
            whole, fused = timing.before, timing.after
            rows.append(("parameters", count, whole.parameters, fused.parameters))
            rows.append(("bytes of weights", size, whole.weight_bytes, fused.weight_bytes))
            if whole.macs is not None and fused.macs is not None:
                rows.append(("multiply-accumulates", count, whole.macs, fused.macs))

        def changed(share: float) -> str:
            return "the same" if share == 1 else f"{100 * share - 100:+.0f} %".replace("-", "−")

        return [(name, text(old), text(new), changed(new / old), new / old) for name, text, old, new in rows if old]

    @cached_property
    def kinds(self) -> list[list[Site]]:
        """The sites by formula, in the order in which the network has the first of each."""
        groups = defaultdict[tuple[tuple[str, ...], str], list[Site]](list)
        for site in self.told.plan.sites:
            groups[site.branches, site.kernel].append(site)
        return list(groups.values())

    def numbers(self, sites: Sequence[Site]) -> tuple[str, str, str]:
        """Return how much faster sites are predicted to be and were measured to be, and how far the worst is off."""
        known = [each for site in sites if (each := self.errors.get(site.path)) is not None]
        before, after = map(price, totals(sites))
        predicted = times(before / after) if after else NOTHING
        return predicted, self._measured_of(sites), error(max(known, default=None))

    def _measured_of(self, sites: Sequence[Site]) -> str:
        """Return how many times as fast these places are by themselves, and the gain in the network."""
        known = {site.output: self.timed_sites.get(site.output) for site in sites}
        timed = [each for each in known.values() if each]
        if len(timed) < len(known):
            return ""
        gained = sum(each.gain.value for each in timed if each.gain)
        ratio = times(sum(each.before for each in timed) / sum(each.after for each in timed))
        return f"{ratio}, {duration(gained)}" if all(each.gain for each in timed) else ratio

    @cached_property
    def timed_sites(self) -> dict[str, SiteTiming]:
        """The places that were timed by themselves, by what the plan calls them."""
        return {site.output: site for timing in self.told.timings for site in timing.sites}

    @cached_property
    def errors(self) -> dict[str, float | None]:
        """How far each site is off in float64, by its path."""
        proof = self.told.conversion.proof
        return {site.path: site.error for site in proof.sites} if proof else {}

    @property
    def kernels(self) -> tuple[SiteKernels, ...]:
        """The kernels that rounding hurts most: as many as one looks at."""
        return self.told.conversion.quantization[:KERNELS_SHOWN]

    @property
    def refused(self) -> list[tuple[Refusal, str, str, str]]:
        """A refusal of each reason, how many there are, where, and what they cost; first those that cost most."""
        groups = defaultdict[Pair, list[Refusal]](list)
        for refusal in self.told.plan.refusals:
            groups[refusal.code, refusal.reason].append(refusal)
        rows = sorted(map(_refused, groups.values()), key=lambda row: -row[0])
        return [row[1:] for row in rows]

    @property
    def health(self) -> list[Pair]:
        """Weights that look wrong: each kind with what it means, and where."""
        return health_rows(self.told.conversion.health, listed)

    def agreement(self) -> Iterator[Pair]:
        """Yield how far the networks agree: proven, as stored, in the written file, on real data."""
        conversion, later = self.told.conversion, self.told.verification
        if proof := conversion.proof:
            known = [each for each in self.errors.values() if each is not None]
            if known:
                yield alone(len(known)), f"{error(max(known))} at most, in float64"
            off, allowed = error(proof.network.error), error(proof.network.tolerance)
            inputs = plural(len(proof.network.trials), "input")
            yield "the whole network", f"{off} on {inputs} in float64 ({allowed} allowed)"
        if conversion.drift and (worst := conversion.drift.worst):
            off, own, allowed = map(error, worst.numbers)
            yield f"as stored, {worst.dtype}", f"{off} (the original's own {own}, {allowed} allowed)"
        for gained in conversion.equalization.gains if conversion.equalization else ():
            yield f"equalised, {gained.bits} bits", gain_line(gained)
        if conversion.output and conversion.output.verified:
            yield "the written file", verified_line(conversion.output.verified)
        if later:
            yield "verified later", f"{later.verdict}: {later.reason}"
            yield from data_lines(later.data) if later.data else ()
        if few := later and later.few_bits:
            yield from ((f"{few.bits} bits, {name}", line) for name, line in few_bits_lines(few))

    @property
    def environment(self) -> list[Pair]:
        """What it was made of, and with."""
        conversion = self.told.conversion
        source, made = conversion.input, conversion.output
        rows = [
            ("original", f"{source.path} ({source.format})"),
            ("its digest", source.digest),
            ("built by", " ".join([source.model, *(source.model_args or ())]) if source.model else ""),
            ("example", example_line(source)),
            ("fused", f"{made.path} ({made.format})" if made else ""),
            ("its digest", made.digest if made else ""),
            ("chosen", chosen_line(conversion.chosen) if conversion.chosen else ""),
            ("policy", str(self.told.plan.policy)),
            ("repfuse", str(conversion.environment).removeprefix("repfuse ")),
            ("took", duration(conversion.seconds)),
        ]
        return [row for row in rows if row[1]]

    def row(self, site: Site) -> tuple[str, ...]:
        """Return a site's row: path, operators, multiply-accumulates, predicted and measured gain, error."""
        before, after = site.before, site.after
        work = change(count(before.launches), count(after.launches)), change(count(before.macs), count(after.macs))
        return site.path or ROOT, *work, *self.numbers([site])


def as_html(told: Told) -> str:
    """Return the page. Raises RepfuseError where the extra is missing."""
    texts = (duration, gain, int8_line, int8_row, interval, operators, share, where)
    functions = {each.__name__: each for each in (*texts, Counter, layers, limit, range_axis, speed_axis)}
    return rendered("report.html.j2", page=Page(told), folded=len(told.plan.sites) > OPEN_SITES, **functions)


def rendered(template: str, **said: Any) -> str:
    """Return the page that a template makes of what is said. Raises RepfuseError where the extra is missing."""
    return str(templates().get_template(template).render(said))


@cache
def templates() -> Any:
    """Return what renders the templates. Raises RepfuseError where the extra is missing."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as missing:
        hint = "Install it: pip install 'repfuse[report]'."
        raise RepfuseError("jinja2 is not installed, which a page in HTML needs.", "", hint) from missing
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # what is markup stays as it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def share(row: Measurement) -> str:
    """Return the share of this machine's speed that the fused network reaches; nothing where that is not known."""
    return "" if row.fused.of_machine is None else percent(row.fused.of_machine)


def layers(branch: str) -> tuple[Pair, ...]:
    """Return the layers of a branch, each with the sign before it: ``conv 3x3 + norm → conv 1x1`` has three. What is
    in brackets is one.
    """
    found, depth = [["", ""]], 0
    for piece in re.split(r"( \+ | → |[()])", branch):
        depth += (piece == "(") - (piece == ")")
        if depth == 0 and piece in (" + ", " → "):
            found.append([piece.strip(), ""])
        else:
            found[-1][1] += piece
    return tuple((sign, text.removeprefix("conv ")) for sign, text in found)


def _refused(same: list[Refusal]) -> tuple[float, Refusal, str, str, str]:
    """Return the predicted time that the places of one reason go on taking, in bytes, and what is said of them."""
    (before, after), gain = map(price, totals(same)), ""
    if before and after:
        said = f"{times(before / after)} faster" if before >= after else f"{times(after / before)} slower"
        gain = f", predicted {said}"
    where = listed(dict.fromkeys(each.where for each in same))
    return before - after, same[0], plural(len(same), "place"), where, f"{declined(same)}{gain}"


# Charts on a logarithmic axis: a row for each measurement, and for each kernel. The template draws them.


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis between its ``ends``: twice as much is as far from 1 as half as much."""

    ends: tuple[float, float]

    @property
    def ticks(self) -> list[float]:
        """Round numbers, as many as have room."""
        span = self.ends[1] / self.ends[0]
        steps = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if span < 3 else (1, 2, 5) if span < 300 else (1,)
        candidates = (step * 10**power for power in range(-9, 10) for step in steps)
        return [each for each in candidates if self.ends[0] < each < self.ends[1]]

    def at(self, number: float) -> str:
        """Return where a number stands on the axis, in percent of its width; at its beginning, what is less."""
        least, greatest = map(log, self.ends)
        return f"{100 * (log(max(number, self.ends[0])) - least) / (greatest - least):.2f}%"

    def holds(self, number: float | None) -> bool:
        """Whether the axis reaches so far."""
        return number is not None and self.ends[0] < number < self.ends[1]


def limit(row: Measurement) -> float | None:
    """Return the ratio that a network has which is as fast as this machine gets: as a plain matrix product."""
    return row.speedup * row.fused.median / row.fused.floor if row.fused.floor else None


def speed_axis(rows: Sequence[Measurement]) -> Axis:
    """Return an axis that holds 1 and all ratios; a limit far beyond all ratios is not drawn."""
    over = [row.over_eager.value for row in rows if row.over_eager]
    least = min(1.0, *over, *(row.low for row in rows))
    greatest = max(1.0, *over, *(row.high for row in rows))
    limits = [each for row in rows if (each := limit(row)) and each < 4 * greatest]
    return Axis((least / 1.12, max(greatest, *limits, 1.0) * 1.12))


RANGES_SHOWN = 1e5
"""A channel whose range is so many times smaller than the largest is drawn at the beginning of the axis."""


def range_axis(sites: Sequence[SiteKernels]) -> Axis:
    """Return an axis that holds the ranges of the channels of all kernels."""
    found = [size for site in sites for size in (*site.before.ranges, *site.after.ranges) if size > 0]
    greatest = max(found, default=1.0)
    return Axis((max(min(found, default=1.0), greatest / RANGES_SHOWN) / 1.12, greatest * 1.12))


# The same as a comment on a pull request: ten lines, and the rest folded away. GitHub takes 65,536 characters.

TIMES_SHOWN = 2
ROWS_SHOWN = 30
TEXT_SHOWN = 300
MARKS = re.compile(r"([\\`*_{}\[\]<>#|~&!$@])")


def as_markdown(told: Told) -> str:
    """Return the comment."""
    page, plan = Page(told), told.plan
    amounts = [(name, before, after, changed) for name, before, after, changed, _ in page.amounts]
    speeds = [
        (text(where(row)), duration(row.original.median), duration(row.fused.median), speedup(row))
        for row in page.speeds
    ]
    lines = [f"**{text(page.name)}**: {page.word}. {text(page.verdict)}", ""]
    lines += markdown_table(("", "before", "after", ""), "lrrr", amounts + speeds[:TIMES_SHOWN])
    counts = f"{plural(len(plan.sites), 'site')}, {plural(len(plan.refusals), 'refusal')}"
    lines += ["", f"<details><summary>{counts}</summary>", ""]
    if speeds:
        rows: list[tuple[str, ...]] = [(*cells, share(row)) for cells, row in zip(speeds, page.speeds, strict=True)]
        lines += (*markdown_table(("", "before", "after", "", "of a matrix product's speed"), "lrrrr", rows), "")
    if page.kinds:
        rows = [(str(len(sites)), code(_formula(sites[0])), *page.numbers(sites)) for sites in page.kinds]
        lines += (*markdown_table(("sites", "formula", "predicted", "measured", "error"), "rlrrr", rows), "")
    if page.refused:
        rows = [(each.code, places, code(place), text(each.hint)) for each, places, place, _ in page.refused]
        lines += (*markdown_table(("not merged", "", "where", "what to do"), "llll", rows), "")
    said = [*page.health, *(("timing", each) for each in page.untimed), *page.agreement()]
    if line := int8_line(told.conversion.quantization):
        said.append(("int8", line))
    made = (*page.environment, ("made by", told.conversion.command))
    facts = [(text(name), text(value)) for name, value in said] + [(name, code(value)) for name, value in made if value]
    return "\n".join([*lines, *markdown_table(("", ""), "ll", facts), "", "</details>", ""])


def _formula(site: Site) -> str:
    branches = (f"{times} of {branch}" if times > 1 else branch for branch, times in Counter(site.branches).items())
    return f"{' | '.join(branches)} → {site.kernel}"


def markdown_table(titles: Sequence[str], sides: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, without the columns that have nothing in them."""
    kept = [number for number in range(len(titles)) if any(row[number] for row in rows)]
    marks = [{"l": "---", "r": "---:"}[side] for side in sides]
    lines = [[row[number] for number in kept] for row in (titles, marks, *rows[:ROWS_SHOWN])]
    if len(rows) > ROWS_SHOWN:
        lines.append([f"and {len(rows) - ROWS_SHOWN} more", *[""] * (len(kept) - 1)])
    return [f"| {' | '.join(line)} |" for line in lines]


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
