"""Renderings: everything said is there at every width, nothing is cut off, and JSON is strict.

What is rendered is plain data, as the documents that repfuse prints hold it, and is read as it reads those.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from repfuse import Plan
from repfuse.cli.app import app
from repfuse.explanations import REFUSALS, TOPICS
from repfuse.report.bench_view import bench_view
from repfuse.report.convert_view import convert_view
from repfuse.report.schema import envelope, to_json, told
from repfuse.report.verify_view import verify_view

Data = dict[str, Any]
LONG = "backbone.stages.2.blocks.13.token_mixer.reparam_conv_with_a_long_name"
WIDTHS = [60, 80, 120, 200]
CODE = next(iter(REFUSALS))
ORIGINAL, FUSED = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def printed(kind: str, data: Data) -> Data:
    """Return a document of its own."""
    return {"schema": 1, "kind": f"repfuse.{kind}", "files": {"original": ORIGINAL, "fused": FUSED}, **data}


def cost(macs: int, launches: int, of_bytes: int = 0) -> Data:
    return {"macs": macs, "launches": launches, "bytes": of_bytes}


def site(path: str = LONG, branches: tuple[str, ...] = ("conv 3x3 + norm", "conv 1x1 + norm", "skip")) -> Data:
    costs = {"before": cost(1_300_000, 5), "after": cost(1_100_000, 1)}
    names = {"owner": "owner", "form": "chain", "source": "x", "output": "add", "nodes": [f"{path}.a", "b"]}
    return {"path": path, "branches": branches, "kernel": "3x3", **costs, **names}


def refusal(code: str, where: str, reason: str, before: Data | None = None, after: Data | None = None) -> Data:
    return {"code": code, "where": where, "reason": reason, "before": before, "after": after}


def plan_of(sites: Iterable[Data], refusals: Iterable[Data] = ()) -> Data:
    made_of = {"fingerprint": "f" * 8, "arguments": {"tuple": []}, "keep_class": False, "matching_borders": []}
    return {"schema": 5, "policy": "cost", "sites": [*sites], "refusals": [*refusals], **made_of}


def plan(*refusals: Data, sites: int = 2) -> Data:
    return plan_of((site(f"{LONG}.{index}") for index in range(sites)), refusals)


def level(rms: float | str, most: float | str | None = None) -> Data:
    return {"rms": rms, "max": rms if most is None else most}


def output_error(error: float | str = 3e-16) -> Data:
    """Errors that are no numbers are texts in a document: "inf", "nan"."""
    what = {"name": "out", "shape": [1, 10], "dtype": "float64", "scale": 1.0, "smallest_rtol": None}
    where = {"worst": [0, 3], "values": [1.0, 1.0], "non_finite": 0}
    return {**what, "relative": level(error), "max_abs": error, **where}


def comparison(error: float | str = 3e-16) -> Data:
    ran = {"label": "the example", "shapes": [[1, 3, 8, 8]], "outputs": [output_error(error)]}
    refused = {"label": "size 1x1", "shapes": [[1, 3, 1, 1]], "skipped": "RuntimeError: too small"}
    return {"trials": [ran, refused], "tolerance": 1e-12}


def proof(error: float | str = 3e-16, **changes: object) -> Data:
    return {"sites": [], "network": comparison(error), "unproven": [], **changes}


def drift(fused: float = 2e-7) -> Data:
    levels = {"own": level(1e-7), "fused": level(fused), "rounding": level(1e-7), "allowed": level(1e-6)}
    return {"outputs": [{"trial": "the example", "name": "out", "dtype": "float32", **levels}]}


def site_drift(trial: str, fused: float, bound: float, of_bound: float) -> Data:
    levels = {"own": level(1e-7), "fused": level(fused), "bound": level(bound)}
    return {"trial": trial, "dtype": "float32", **levels, "of_bound": of_bound}


def measurement(low: float, high: float, speed: float) -> Data:
    times = {"median": 2e-3, "fastest": 1.9e-3, "slowest": 2.2e-3, "calls": 4, "times": [1.9e-3, 2.2e-3]}
    both = {"batch_size": 1, "threads": 2, "original": times, "fused": times}
    warnings = ["The first round was slow; use more --rounds."]
    return {**both, "speedup": speed, "low": low, "high": high, "warnings": warnings}


def benchmark(*measurements: Data, **more: object) -> Data:
    costs = {"parameters": 1_000_000, "weight_bytes": 4_000_000, "macs": None, "peak_bytes": None}
    of = {"device": "cpu", "dtype": "float32", "shapes": [[1, 3, 8, 8]], "before": costs, "after": costs}
    return {**of, "measurements": measurements, **more}


def bench_document(made: Data) -> Data:
    return printed("benchmark", made)


COLD = {"original": 1.0, "fused": 0.5}


def timed_site(of: Data, value: float, low: float, high: float) -> Data:
    """Return what was timed of a site, and what the network gained by it, in seconds."""
    named = {name: of[name] for name in ("path", "output", "kernel")}
    times = {"predicted": 5.0, "before": 4e-3, "after": 1e-3, "speedup": {"value": 4.0, "low": 3.9, "high": 4.1}}
    return {**named, **times, "gain": {"value": value, "low": low, "high": high}}


def full_benchmark() -> Data:
    """Return one of several inputs in several runtimes, with a place."""
    entries = [
        measurement(1.9, 2.1, 2.0) | {"shapes": [[8, 3, side, side], [8, 10]], "runtime": runtime}
        for side in (224, 320)
        for runtime in ("eager", "onnxruntime")
    ]
    return benchmark(*entries, sites=[timed_site(site(), -2e-5, -1.9e-4, 2.1e-4)])


def report(**changes: object) -> Data:
    source = {"path": "models/in.pt", "digest": ORIGINAL, "format": "pt", "model": None, "input_origin": "guess"}
    fields = {
        "status": "converted",
        "environment": {"repfuse": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "platform": "Linux x86_64"},
        "input": source | {"shapes": [[1, 3, 8, 8]], "dtypes": ["float32"]},
        "plan": plan(),
        "seconds": 0.5,
        "proof": proof(),
        "drift": drift(),
        "output": {"path": "models/out.pt", "digest": FUSED, "format": "pt"},
        "timing": benchmark(measurement(1.9, 2.1, 2.0)),
        "notes": ["input 1x3x8x8 is a guess"],
    }
    return printed("conversion", {**fields, **changes})


def planned(found: Data) -> Data:
    """Return the report of a conversion that was only planned."""
    return report(status="planned", plan=found, output=None, proof=None, drift=None, timing=None)


def verification(**changes: object) -> Data:
    row = {"name": "out", "trial": "the example", "error": output_error()}
    row |= {"rounding": level(1e-7), "allowed": level(1e-6), "drift": drift()["outputs"][0]}
    fields = {
        "verdict": "same",
        "reason": "Rounding explains it.",
        "dtypes": ["float32", "float32"],
        "outputs": [row],
        "trials": comparison()["trials"],
        "drift": drift(),
        "data": real_data(360, 64, 1.0, 0.9972, 0.9972),
        "notes": ["A note."],
    }
    return printed("verification", {**fields, **changes})


def real_data(samples: int, compared: int, agree: float, original: float | None, fused: float | None, **more) -> Data:
    right = {"accuracy_original": original, "accuracy_fused": fused}
    return {"samples": samples, "compared": compared, "top1_agreement": agree, **right, **more}


def flips(samples: int, right_to_wrong: int | None, wrong_to_right: int | None, least: float, most: float) -> Data:
    turned = {"right_to_wrong": right_to_wrong, "wrong_to_right": wrong_to_right}
    return {"samples": samples, **turned, "smallest_margin": least, "largest_margin": most}


def read(document: Data) -> Any:
    """Return a conversion, a verification or a benchmark as repfuse reads it."""
    if document["kind"] == "repfuse.conversion":
        found = told([("a", document)])
        return replace(found.conversion, plan=found.plan)
    found = told([("a", report()), ("b", document)])
    return found.verification or found.benchmarks[0]


def text(document: Data, width: int = 100, **how: object) -> str:
    """Return what people are shown of a document."""
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    view = {"conversion": convert_view, "verification": verify_view, "benchmark": bench_view}
    for part in view[document["kind"].removeprefix("repfuse.")](read(document), **how):
        console.print(part)
    return console.file.getvalue()


def explained(*name: str, width: int = 100) -> str:
    """Return what `repfuse explain` prints."""
    return CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["explain", *name]).stdout


def squeezed(shown: str) -> str:
    return "".join(shown.split())


def squeezed_words(shown: str) -> str:
    return " ".join(shown.split())


PARTED = {"path": "a", "after": "b", "trial": "t", "error": level(1), "allowed": level(0)}
VIEWS = {
    "convert": lambda width: text(report(), width),
    "convert -v": lambda width: text(report(), width, verbose=True),
    "refused": lambda width: text(
        planned(plan(*(refusal(CODE, f"{LONG}.{index}", "a reason") for index in range(9)))), width
    ),
    "verify": lambda width: text(verification(first_difference=PARTED), width),
    "bench": lambda width: text(bench_document(benchmark(measurement(1.9, 2.1, 2.0), cold=COLD)), width),
    "bench, in full": lambda width: text(bench_document(full_benchmark()), width),
    "explain": lambda width: explained(CODE, width=width),
    "topic": lambda width: explained("limits", width=width),
    "topics and codes": lambda width: explained(width=width),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_nothing_is_cut_off_and_no_line_is_too_long(name: str, width: int) -> None:
    shown = VIEWS[name](width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_long_module_paths_are_never_broken(width: int) -> None:
    lines = [line.rstrip() for line in text(planned(plan()), width, verbose=True).splitlines()]
    assert f"  {LONG}.0" in lines and f"  {LONG}.1" in lines


def test_a_conversion_says_what_matters_and_the_rest_on_demand() -> None:
    brief, full = (text(report(), 80, verbose=all) for all in (False, True))
    in_both = (
        "thewholenetworkon1input3.0e-161.0e-12passed",
        "1inputleftoutthatnotbothnetworksarefor",
        "drift,float32thewholenetwork2.0e-071.0e-06passed",
        "models/out.pt(pt",
        "parameters1.00M",
        "models/out.pt.report.json",
        "note:input1x3x8x8isaguess",
        "took500ms",
    )
    in_full = (
        "models/in.pt(pt,sha256:" + "1" * 12,
        "models/out.pt(pt,sha256:" + "2" * 12,
        "1x3x8x8float32(aguess)",
        "2sites,10→2operators",
        "worst:theexample;theoriginal'sownerrorthereis1.0e-07",
        "2.00x(1.90to2.10)",
        "10→2operators,2.60M→2.20Mmultiply-accumulates",
    )
    for part in in_both:
        assert part in squeezed(brief) and part in squeezed(full), part
    for part in in_full:
        assert part in squeezed(full) and part not in squeezed(brief), part
    last = "in: 10 → 2 operators, exact to 3.0e-16, 2.0x faster (1.9 to 2.1) at batch 1"
    assert brief.splitlines()[-1] == full.splitlines()[-1] == last
    assert len(brief.splitlines()) < 20


NOTHING = "nothing to fuse (no layer is next to another that it could merge with)"


@pytest.mark.parametrize(
    ("changes", "plan_path", "last"),
    [
        ({"status": "failed", "output": None}, "", "in: not converted: the check failed, and nothing was written"),
        ({"status": "nothing-to-fuse", "output": None}, "", f"in: {NOTHING}, nothing was written"),
        ({"status": "nothing-to-fuse"}, "", f"in: {NOTHING}, written as it is"),
        ({"status": "planned", "output": None}, "", "in: 2 sites, 10 → 2 operators; nothing was written"),
        ({"status": "planned"}, "p.json", "in: 2 sites, 10 → 2 operators; the plan was written to p.json"),
    ],
)
def test_the_last_line_is_what_was_done(changes: dict[str, object], plan_path: str, last: str) -> None:
    assert text(report(**changes), plan_path=plan_path).splitlines()[-1] == last


def test_a_network_is_called_as_its_source_calls_it() -> None:
    for model, name in ((None, "in"), ("timm:mobileone_s0", "mobileone_s0"), ("models/net.py:build", "in")):
        made = report(input=report()["input"] | {"model": model})
        assert text(made).splitlines()[-1].startswith(f"{name}: 10 → 2 operators")


def test_a_block_that_is_the_whole_network_has_a_name() -> None:
    assert "(root)" in text(planned(plan_of([site(path="")])))


def test_a_failed_proof_is_said_and_not_dressed_up() -> None:
    shown = text(report(status="failed", proof=proof(1e-3), output=None, timing=None))
    assert "note: In float64 the largest error is 1.0e-03" in shown
    assert "nothing was written" in shown
    assert "1.0e-03   1.0e-12   FAILED" in shown and "the whole network on 1 input: worst: the example" in shown


def test_a_mismatch_and_an_unmeasured_drift_are_said() -> None:
    trial = {"label": "size 1x1", "shapes": [[1, 3, 1, 1]], "mismatch": "the shapes differ"}
    unmeasured = {"outputs": [], "measured": False, "problem": "no half on this CPU"}
    shown = text(report(proof=proof(network={"trials": [trial], "tolerance": 1e-12}), drift=unmeasured))
    assert "note: size 1x1: the shapes differ." in shown and "FAILED" in shown
    assert "the drift was not measured: no half on this CPU" in shown


def test_refusals_of_one_kind_are_said_once_with_their_number() -> None:
    kinds = [refusal(CODE, f"layer{index}", "why not") for index in range(9)]
    shown = text(planned(plan(*kinds, refusal(CODE, "other", "another reason"), sites=0)))
    assert shown.count("why not") == 1
    assert "9 places" in shown
    assert "1 place" in shown
    assert "and 5 more" in shown
    assert squeezed(REFUSALS[CODE].hint) in squeezed(shown)


def test_a_declined_refusal_shows_both_costs() -> None:
    declined = refusal(CODE, "here", "slower", cost(1000, 3), cost(9000, 1))
    assert "3 → 1 operators, 1.00 k → 9.00 k multiply-accumulates" in text(planned(plan(declined)))


def test_equal_branches_are_counted() -> None:
    equal = site(branches=("conv 3x3 + norm", "conv 3x3 + norm", "conv 1x1 + norm"))
    assert "    2 of (conv 3x3 + norm), conv 1x1 + norm → 3x3; " in text(planned(plan_of([equal])))


@pytest.mark.parametrize(
    ("low", "high", "factor", "told"),
    [
        (1.9, 2.1, 2.0, "2.0x faster (1.9 to 2.1) at batch 1, 2 threads"),
        (1.4, 1.5, 1.45, "1.45x faster (1.40 to 1.50) at batch 1, 2 threads"),
        (0.4, 0.6, 0.5, "2.0x slower (1.7 to 2.5) at batch 1, 2 threads"),
        (0.9, 1.2, 1.1, "no difference in speed (0.90 to 1.20) at batch 1, 2 threads"),
    ],
)
def test_a_benchmark_says_its_verdict(low: float, high: float, factor: float, told: str) -> None:
    shown = text(bench_document(benchmark(measurement(low, high, factor))))
    assert shown.splitlines()[-1] == told
    assert f"({low:.2f} to {high:.2f})" in shown
    assert "use more --rounds" in shown


def test_timing_that_is_too_noisy_to_say_anything_says_only_that() -> None:
    noisy = measurement(0.4, 3.0, 1.7)
    shown = text(bench_document(benchmark(noisy)))
    assert shown.splitlines()[-1] == "timing too noisy to say anything at batch 1, 2 threads"
    assert not any(word in shown for word in ("1.7", "0.40", "3.00", "faster", "difference", "note:"))
    last = text(report(timing=benchmark(noisy))).splitlines()[-1]
    assert last == "in: 10 → 2 operators, exact to 3.0e-16, timing too noisy to say anything"


def test_the_notebooks_method_is_labelled() -> None:
    shown = text(bench_document(benchmark(measurement(1.9, 2.1, 2.0), cold=COLD)))
    assert "no measurement of speed" in squeezed_words(shown)


def test_a_verification_reports_real_data_and_what_was_refused() -> None:
    shown = text(verification())
    assert "the same class for 100 % of the samples" in shown
    assert "original 99.7 %, fused 99.7 %" in shown
    assert "1 input that not both networks are for (RuntimeError: too small)" in shown
    assert shown.rstrip().endswith("Same. Rounding explains it.")


def test_a_verification_shows_the_proof_where_there_is_one() -> None:
    shown = squeezed(text(verification(proof=proof()), 120, verbose=True))
    assert "proof,float64thewholenetworkon1input3.0e-161.0e-12passed" in shown
    assert "float64weightsasstored" in shown
    assert "drift,float32thewholenetwork" in shown
    assert "outagreeswithinatol3.0e-16,ofnumbersupto1" in shown


def test_of_many_outputs_the_worst_are_shown_each_by_its_name() -> None:
    (row,) = verification()["outputs"]
    rows = [row | {"name": f"out[{index}]", "error": output_error(10.0**-index)} for index in range(3, 9)]
    shown = text(verification(outputs=rows, drift=None), 120)
    table = shown[: shown.index("Compared")]
    assert [f"out[{index}]" in table for index in range(3, 9)] == [True] * 4 + [False] * 2


def test_each_kind_of_check_can_fail() -> None:
    weight = {"name": "a.weight", "dtype": "float32", "shape": [3], "wrong": 2, "spacings": 7.5}
    of_both = {"passed": False, "tolerance": 1e-12, "reason": "why", "trials": 1}
    sites = [
        {"path": "a", **of_both, "error": 3e-16, "comparison": comparison(), "weights": [weight]},
        {"path": "b", **of_both, "error": 1e-3, "comparison": comparison(1e-3)},
    ]
    sites[1]["drift"] = site_drift("input 1x1", 1e-3, 1e-5, 80.0)
    failed = verification(proof=proof(sites=sites, unproven=["c"]))
    shown = squeezed(text(failed, 120))
    for part in (
        "2sites,eachalone1.0e-031.0e-12FAILED",
        "2sites,eachalone:worst:b,theexample",
        "1storedtensor7.5ulp0.5ulpFAILED",
        "1storedtensor:worst:a.weight,2wrong",
        "therestofthenetwork-equalFAILED",
        "therestofthenetwork:worst:c",
        "1sitealone801xboundFAILED",
        "1sitealone:worst:b,input1x1",
    ):
        assert part in shown, part
    place = read(failed).proof.place
    assert place.path == "a" and place.error.max == 7.5 and place.after == ""


def test_real_data_that_flips_is_weighed() -> None:
    first = [
        {"sample": "7/a.png", "original": 7, "fused": 9, "label": 7},
        {"sample": "12", "original": -1, "fused": 3},
    ]
    five = {"top5_agreement": 0.98, "top5_accuracy_original": 0.9999, "top5_accuracy_fused": 0.998}
    flipped = flips(3, 2, 0, 1e-9, 4e-7) | {"first": first}
    data = real_data(360, 360, 0.99, 0.95, 0.94, **five, flips=flipped, without_class=1)
    shown = squeezed_words(text(verification(data=data), 200))
    for part in (
        "real data 360 samples top-1",
        "the same five classes for 98.0 % of the samples",
        "top-5 accuracy original 99.9900 %, fused 99.8 %",
        "no class 1 sample with outputs that are not a number",
        "3 samples in another class (2 right to wrong, 0 wrong to right)",
        "flipped 7/a.png: 7 → 9 (it is 7); 12: -1 → 3; and 1 more",
        "preferred its own by 1.0e-09 to 4.0e-07 of its largest output there",
    ):
        assert part in shown, part
    unlabelled = real_data(360, 360, 0.99, None, None, flips=flips(1, None, None, 1e-9, 1e-9))
    shown = squeezed_words(text(verification(data=unlabelled), 200))
    assert "1 sample in another class; the original preferred its own by 1.0e-09 of" in shown
    assert "accuracy" not in shown and "top-5" not in shown


def test_a_difference_names_the_place() -> None:
    place = {"path": "stages.1", "after": "stages.0", "trial": "the example"}
    place |= {"error": level(0.1, 0.2), "allowed": level(1e-6)}
    shown = squeezed_words(text(verification(verdict="different", first_difference=place)))
    assert "at stages.1, after stages.0, which still agrees: relative error 2.0e-01" in shown
    assert "Different." in shown


def test_could_not_tell_needs_no_outputs() -> None:
    shown = text(verification(verdict="could-not-tell", outputs=[], trials=[], drift=None, data=None))
    assert "Could not tell." in shown


def test_explanations_are_complete() -> None:
    every = explained()
    for code, explanation in REFUSALS.items():
        shown = squeezed_words(explained(code, width=120))
        assert explanation.title in shown
        assert squeezed(explanation.meaning) in squeezed(shown)
        assert squeezed(explanation.hint) in squeezed(shown)
        assert code in every


@pytest.mark.parametrize("name", TOPICS)
def test_topics_are_shown_whole(name: str) -> None:
    topic = TOPICS[name]
    shown = squeezed(explained(name, width=80))
    assert all(squeezed(part) in shown for part in (topic.title, topic.opening, *topic.points.values()))
    assert f"{name} {topic.title}" in squeezed_words(explained(width=80))  # on one line


def strict(document: str) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(document, parse_constant=refuse)  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", [3e-16, "inf", "nan"])
def test_the_report_is_strict_json_with_a_schema(error: float | str) -> None:
    found = strict(to_json(envelope("conversion", read(report(proof=proof(error))).to_dict())))
    assert found["schema"] == 1
    assert found["kind"] == "repfuse.conversion"
    assert found["proof"]["network"]["trials"][0]["outputs"] == [output_error(error)]
    assert {"status", "environment", "input", "output", "plan", "proof", "drift", "timing", "notes"} <= set(found)
    assert Plan.from_dict(found["plan"]) == Plan.from_dict(plan())


def test_a_report_without_its_optional_parts_is_json_too() -> None:
    found = strict(to_json(read(report(proof=None, drift=None, output=None, timing=None)).to_dict()))
    assert found["proof"] is found["drift"] is found["output"] is found["timing"] is None


@pytest.mark.parametrize("more", [{}, {"left_out": ["openvino: no"], "cold": COLD}])
def test_a_benchmark_survives_its_file(more: Data) -> None:
    kept = read(bench_document(full_benchmark() | more))
    assert read(strict(to_json(bench_document(kept.to_dict())))) == kept
    assert kept.left_out == tuple(more.get("left_out", ())) and len(kept.measurements) == 4


def test_what_is_not_json_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"error": math.nan})


def test_a_speed_up_that_is_only_known_within_a_wide_range_gets_no_number() -> None:
    shown = squeezed_words(text(bench_document(benchmark(measurement(5.21, 235.6, 215.4)))))
    assert "unsteady (5.21 to 236)" in shown
    assert "faster, unsteady (5.2 to 235.6) at batch 1" in shown
    assert "215" not in shown


def test_what_was_run_of_the_file_is_said() -> None:
    found = {
        "runtime": "ONNX Runtime 1.32",
        "shapes": ["d0x3x8x8"],
        "compared": ["the example", "batch 2"],
        "refused": ["size 1x1"],
        **{"error": 2e-7, "own": 1e-7, "allowed": 1e-6},
        "where": "a fresh process",
    }
    made = report(output={"path": "out.onnx", "digest": FUSED, "format": "onnx", "verified": found})
    shown = squeezed(text(made, 120, verbose=True))
    for part in (
        "inafreshprocess;ONNXRuntime1.32on2inputs:relativeerror2.0e-07",
        "(theoriginal'sown1.0e-07,allowed1.0e-06)",
        "takesd0x3x8x8;doesnottakesize1x1",
    ):
        assert part in shown, part
    assert read(made).to_dict()["output"]["verified"]["compared"] == ["the example", "batch 2"]


def test_a_file_that_was_read_again_is_said_with_where_and_how_much_of_it() -> None:
    where = "this process, because this program is no Python that could be started again"
    found = {"runtime": "PyTorch 2.13", "shapes": [], "compared": ["the example"], "refused": [], "where": where}
    found |= {"tensors": 12, "identical": True, "seconds": 2.0}
    written = {"path": "o.pt", "digest": FUSED, "format": "pt", "verified": found}
    made = report(output=written)
    assert f"o.pt (pt, read again in {where})" in squeezed_words(text(made, 300))
    shown = squeezed_words(text(made, 300, verbose=True))
    assert (
        f"verified in {where}; 12 tensors the same bit by bit; PyTorch 2.13 on 1 input: the outputs are those of the "
        "proven network, bit by bit; took 2.00 s"
    ) in shown
    unrun = report(output=written | {"verified": found | {"compared": []}})
    assert "not run" in text(unrun, verbose=True)
