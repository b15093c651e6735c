"""A plan and a conversion for people: what merges into what, what does not and why, and last the line that matters."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from repfuse.benching.results import Benchmark
from repfuse.checking.results import Drift, Equalization, Proof, SignalGain, Verified
from repfuse.explanations import Explanation, Topic
from repfuse.health import MEANINGS, Ailment, Anomaly
from repfuse.plans import ROOT, Cost, Plan, Policy, Refusal, Site, total
from repfuse.quantization import BITS, SiteKernels, failing, needed, together
from repfuse.report.bench_view import speed, speedup
from repfuse.report.schema import Chosen, Input, Report, Status, report_path
from repfuse.report.tables import (
    BAD,
    GOOD,
    NUMBER,
    UNSURE,
    change,
    count,
    decibels,
    duration,
    error,
    facts,
    first,
    heading,
    indented,
    notes,
    plural,
    shape,
    table,
)
from repfuse.report.verify_view import checks_view, of_drift, of_network, of_proof, of_site_drift

DIGEST_SHOWN = len("sha256:") + 12
STYLES: dict[Status, str] = {"converted": GOOD, "failed": BAD, "nothing-to-fuse": UNSURE, "planned": UNSURE}


def convert_view(
    report: Report, plan_path: str = "", *, page: str = "", verbose: bool = False
) -> Iterator[RenderableType]:
    """Yield what matters of a report, or all of it; ``plan_path`` is where its plan was saved, ``page`` where it is as
    a page. What was found and not done is told in full.
    """
    done = report.status == "converted"
    if verbose or not done:
        yield from plan_view(report.plan, verbose=verbose)
    yield from int8_view(report.quantization) if verbose else ()
    yield from health_view(report.health)
    if report.drift:
        proof, equalized = report.proof, report.equalization
        checks = [*of_proof(proof), *of_site_drift(proof)] if proof else []
        checks += of_network(equalized.comparison, "equalised") if equalized and equalized.comparison else []
        yield from checks_view([*checks, *of_drift(report.drift)], verbose=verbose)
        yield from notes(check_notes(proof, report.drift))
    if report.equalization:
        yield from equalization_view(report.equalization, verbose=verbose)
    yield heading("Result")
    details = _details(report) if verbose else _facts(report)
    beside = str(report_path(Path(report.output.path))) if report.output else ""
    places = [("report", beside), ("page", page), ("plan", plan_path), ("took", duration(report.seconds))]
    yield facts([*details, *places])
    yield from notes(report.notes)
    if report.output and report.output.use:
        yield heading("To use it")
        yield indented("\n".join(report.output.use))
    yield Text(f"\n{last_line(report, plan_path)}", style=STYLES[report.status])


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what one looks for after a conversion, or before it."""
    if report.status != "converted":
        yield "example", example_line(report.input)
    yield "chosen", chosen_line(report.chosen) if report.chosen else ""
    if line := int8_line(report.quantization, BITS[:1] if report.status == "converted" else BITS):
        yield "int8", f"{line}; see `repfuse explain int8`"
    if report.status == "converted" and report.plan.refusals:
        counts = Counter(refusal.code for refusal in report.plan.refusals).most_common()
        yield "not fused", f"{', '.join(f'{code} ({times})' for code, times in counts)}; -v says where and why"
    yield from cost_lines(report.timing) if report.timing else ()
    if report.output:
        verified = report.output.verified
        where = f"in {verified.where}" if verified and verified.where else f"by {verified.runtime}" if verified else ""
        checked = f", read again {where}" if where else ""
        yield "output", f"{report.output.path} ({report.output.format}{checked})"


def _details(report: Report) -> Iterator[tuple[str, str]]:
    yield "input", file_line(report.input.path, report.input.format, report.input.digest)
    yield "example", example_line(report.input)
    model, arguments = report.input.model, report.input.model_args or ()
    yield "model", ", ".join([model, *arguments]) if model else ""  # nothing where the file holds it
    yield "chosen", chosen_line(report.chosen) if report.chosen else ""
    yield "sites", summary(report.plan)
    if report.timing:
        yield from cost_lines(report.timing)
        row = report.timing.measurements[0]
        took = change(duration(row.original.median), duration(row.fused.median))
        where = f"batch {row.batch_size}, {plural(row.threads, 'thread')}, {report.timing.device}"
        yield "timing", f"{took} a call: {speedup(row)} ({where}; `repfuse bench` measures longer)"
    if report.output:
        yield "output", file_line(report.output.path, report.output.format, report.output.digest)
        yield "verified", verified_line(report.output.verified) if report.output.verified else ""
    yield "with", str(report.environment)


def last_line(report: Report, plan_path: str = "") -> str:
    """Return what changed, how exact it is, and how much faster."""
    name = name_of(report.input)
    if report.status == "failed":
        return f"{name}: not converted: the check failed, and nothing was written"
    written = f"the plan was written to {plan_path}" if plan_path else "nothing was written"
    if report.status == "nothing-to-fuse":
        why = "" if report.plan.refusals else " (no layer is next to another that it could merge with)"
        return f"{name}: nothing to fuse{why}, {'written as it is' if report.output else written}"
    if report.status == "planned":
        return f"{name}: {plural(len(report.plan.sites), 'site')}, {operators(report.plan)}; {written}"
    equalized = report.equalization
    proofs = (report.proof, equalized and equalized.comparison)
    done = achieved(report.plan, equalized, [each.error for each in proofs if each])
    if report.timing and report.plan.sites:
        first = report.timing.measurements[0]
        done.append(speed(first) + ("" if first.says_nothing else f" at batch {first.batch_size}"))
    return f"{name}: {', '.join(done)}"


def achieved(plan: Plan, equalized: Equalization | None, errors: Iterable[float | None]) -> list[str]:
    """Return what merging and equalising did, each in a few words, and how exact it is by the largest of ``errors``."""
    done = [operators(plan)] if plan.sites else []
    done += [f"{plural(equalized.scales, 'channel')} equalised"] if equalized and equalized.tensors else []
    known = [each for each in errors if each is not None]
    return [*done, f"exact to {error(max(known))}"] if known else done


def gain_line(gain: SignalGain) -> str:
    """Return what equalising gains with so many bits."""
    levels = change(*(f"{level:.1f} dB" for level in (gain.before, gain.after)))
    return f"signal-to-noise of the outputs {levels}"


def equalization_view(equalization: Equalization, *, verbose: bool) -> Iterator[RenderableType]:
    """Yield what was rescaled, what that gains, and where nothing could be."""
    yield heading("Equalised")
    by = "powers of two" if equalization.powers_of_two else "any factors"
    scaled = f"{plural(equalization.scales, 'channel')} in {plural(len(equalization.tensors), 'tensor')}, by {by}"
    nothing = "nothing gets better by it" if equalization.scales else "no channels between layers can be scaled"
    rows = [("scaled", scaled if equalization.tensors else nothing)]
    rows += [(f"{gain.bits} bits", f"{gain_line(gain)} (on {equalization.inputs})") for gain in equalization.gains]
    yield facts(rows)
    if verbose and equalization.tensors:
        factors = ((each.name, f"{each.least:.3g}", f"{each.most:.3g}") for each in equalization.tensors)
        yield table(("Tensor", ("multiplied by", NUMBER), ("to", NUMBER)), factors)
    yield from refusals_view(equalization.refusals, "Not equalised")


def name_of(source: Input) -> str:
    """Return what to call the network: as its model source does, else as its file."""
    zoo, _, name = (source.model or "").partition(":")
    return name if zoo in ("timm", "torchvision") else Path(source.path).name.partition(".")[0]


def cost_lines(timing: Benchmark) -> Iterator[tuple[str, str]]:
    """Yield what the whole network stores and computes, counted as `repfuse bench` does."""
    before, after = timing.before, timing.after
    yield "parameters", change(count(before.parameters), count(after.parameters))
    if before.macs is not None and after.macs is not None:
        yield "computes", f"{change(count(before.macs), count(after.macs))} multiply-accumulates"


def file_line(path: str, kind: str, digest: str) -> str:
    """Return ``PATH (FORMAT, DIGEST)``, of the digest so much that two files are told apart; the JSON has all of it."""
    return f"{path} ({kind}, {digest[:DIGEST_SHOWN]}...)"


def example_line(source: Input) -> str:
    """Return the example inputs and where they come from: ``1x3x224x224 float32 (from the checkpoint)``."""
    tensors = (f"{shape(sizes)} {dtype}" for sizes, dtype in zip(source.shapes, source.dtypes, strict=True))
    origin = {"given": "given", "guess": "a guess"}.get(source.input_origin, f"from the {source.input_origin}")
    return f"{', '.join(tensors)} ({origin})"


def chosen_line(chosen: Chosen) -> str:
    """Return what was chosen, as the options that say it."""
    plan = [f"--plan {chosen.plan}"] if chosen.plan else []
    globs = (f"--{name} {glob}" for name in ("include", "exclude") for glob in getattr(chosen, name))
    return " ".join([*plan, *globs])


def check_notes(proof: Proof | None, drift: Drift) -> Iterator[str]:
    """Yield what the table of checks does not say."""
    if proof and not proof.passed:
        yield proof.reason
    if proof and not proof.informative:
        yield "the network's outputs are 0 or not finite on every input: only its sites tell"
    if proof and proof.network.limits:
        yield proof.network.limits
    if proof and proof.network.skipped:
        yield f"{plural(len(proof.network.skipped), 'input')} left out that not both networks are for"
    if not drift.measured:
        yield f"the drift was not measured: {drift.problem}"


def verified_line(verified: Verified) -> str:
    """Return where the file was read again and run before it counted, and what was found."""
    outputs = "the outputs are those of the proven network, bit by bit"
    if verified.error is not None:
        own, allowed = error(verified.own), error(verified.allowed)
        outputs = f"relative error {error(verified.error)} (the original's own {own}, allowed {allowed})"
    told = (
        f"in {verified.where}" if verified.where else "",
        f"{plural(verified.tensors, 'tensor')} the same bit by bit" if verified.tensors else "",
        f"{verified.runtime} on {plural(len(verified.compared), 'input')}: {outputs}"
        if verified.compared
        else "not run",
        f"takes {', '.join(verified.shapes)}" if verified.shapes else "",
        f"does not take {', '.join(verified.refused)}" if verified.refused else "",
        f"took {duration(verified.seconds)}" if verified.seconds else "",
    )
    return "; ".join(filter(None, told))


# What is found in a network.


def health_rows(anomalies: Iterable[Anomaly], shown: Callable[[list[str]], str]) -> list[tuple[str, str]]:
    """Return each kind of anomaly, weights that look wrong, with what it means and where, as far as ``shown``."""
    found = defaultdict[Ailment, list[str]](list)
    for each in anomalies:
        found[each.what].append(f"{each.name} ({each.count} of {each.of})")
    return [(what, f"{MEANINGS[what]}; {shown(names)}") for what, names in found.items()]


def health_view(anomalies: Sequence[Anomaly]) -> Iterator[RenderableType]:
    """Yield each kind of anomaly once; nothing where all weights are well."""
    if anomalies:
        yield heading("Weights that look wrong")
        order = list(MEANINGS)
        yield facts(health_rows(sorted(anomalies, key=lambda each: order.index(each.what)), first))


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
    return _costs(*totals(plan.sites), macs=False)


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
    before, after = totals(refusals)
    return "" if before == Cost() else _costs(before, after)


def _costs(before: Cost, after: Cost, *, macs: bool = True) -> str:
    of_macs = f", {change(count(before.macs), count(after.macs))} multiply-accumulates" if macs else ""
    return f"{change(count(before.launches), count(after.launches))} operators{of_macs}"


def totals(places: Sequence[Site | Refusal]) -> tuple[Cost, Cost]:
    """Return what places cost together, before and after, as far as that is known."""
    known = [(place.before, place.after) for place in places if place.before and place.after]
    return total(before for before, _ in known), total(after for _, after in known)


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
