"""Renderings: everything said is there at every width, nothing is cut off, and JSON is strict."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
from rich.console import Console

from repfuse.benching.results import (
    Benchmark,
    ColdCalls,
    Gain,
    Measurement,
    NetworkCost,
    Ratio,
    SiteTiming,
    Timing,
)
from repfuse.checking.results import (
    Comparison,
    Drift,
    FirstDifference,
    Flip,
    Flips,
    Level,
    OutputDrift,
    OutputError,
    OutputVerdict,
    Proof,
    RealData,
    SiteDrift,
    SiteProof,
    TrialComparison,
    Verification,
    Verified,
    WeightProof,
)
from repfuse.explanations import REFUSALS, TOPICS
from repfuse.plans import Cost, Plan, Refusal, Site
from repfuse.report.bench_view import bench_view
from repfuse.report.convert_view import convert_view, explain_view, list_view, merged, name_of, plan_view, topic_view
from repfuse.report.schema import Environment, Input, Output, Report, envelope, to_json
from repfuse.report.verify_view import verify_view

LONG = "backbone.stages.2.blocks.13.token_mixer.reparam_conv_with_a_long_name"
WIDTHS = [60, 80, 120, 200]
CODE = next(iter(REFUSALS))


def site(path: str = LONG, branches: tuple[str, ...] = ("conv 3x3 + norm", "conv 1x1 + norm", "skip")) -> Site:
    before, after = Cost(macs=1_300_000, launches=5), Cost(macs=1_100_000, launches=1)
    return Site(path, branches, "3x3", before, after, "owner", "chain", "x", "add", (f"{path}.a", "b"))


def plan(*refusals: Refusal, sites: int = 2) -> Plan:
    return Plan(
        tuple(site(f"{LONG}.{index}") for index in range(sites)),
        refusals,
        "cost",
        "f" * 8,
        {"tuple": []},
    )


def output_error(error: float = 3e-16) -> OutputError:
    return OutputError("out", (1, 10), "float64", Level(error, error), error, 1.0, None, (0, 3), (1.0, 1.0), 0)


def comparison(error: float = 3e-16) -> Comparison:
    ran = TrialComparison("the example", ((1, 3, 8, 8),), (output_error(error),))
    refused = TrialComparison("size 1x1", ((1, 3, 1, 1),), skipped="RuntimeError: too small")
    return Comparison((ran, refused), 1e-12)


def proof(error: float = 3e-16, **changes: object) -> Proof:
    return Proof(**{"sites": (), "network": comparison(error), "unproven": (), **changes})  # type: ignore[arg-type]


def drift(fused: float = 2e-7) -> Drift:
    levels = (Level(1e-7, 1e-7), Level(fused, fused), Level(1e-7, 1e-7), Level(1e-6, 1e-6))
    return Drift((OutputDrift("the example", "out", "float32", *levels),))


def measurement(low: float, high: float, speed: float) -> Measurement:
    times = Timing(2e-3, 1.9e-3, 2.2e-3, 4, (1.9e-3, 2.2e-3))
    return Measurement(1, 2, times, times, speed, low, high, ("The first round was slow; use more --rounds.",))


def benchmark(*measurements: Measurement, cold: ColdCalls | None = None) -> Benchmark:
    cost = NetworkCost(1_000_000, 4_000_000, None, None)
    return Benchmark("cpu", "float32", ((1, 3, 8, 8),), cost, cost, measurements, cold)


def full_benchmark() -> Benchmark:
    """Return one of several inputs in several runtimes, with a place."""
    entries = [
        replace(measurement(1.9, 2.1, 2.0), shapes=((8, 3, side, side), (8, 10)), runtime=runtime)
        for side in (224, 320)
        for runtime in ("eager", "onnxruntime")
    ]
    ratio, gain = Ratio(4.0, 3.9, 4.1), Gain(-2e-5, -1.9e-4, 2.1e-4)
    return replace(benchmark(*entries), sites=(SiteTiming(LONG, "add", "3x3", 5.0, 4e-3, 1e-3, ratio, gain),))


def report(**changes: object) -> Report:
    source = Input("models/in.pt", "sha256:" + "1" * 64, "pt", None, ((1, 3, 8, 8),), ("float32",), "guess")
    fields = {
        "status": "converted",
        "environment": Environment("0.1.0", "2.13.0", "3.11.7", "Linux x86_64"),
        "input": source,
        "plan": plan(),
        "seconds": 0.5,
        "proof": proof(),
        "drift": drift(),
        "output": Output("models/out.pt", "sha256:" + "2" * 64, "pt"),
        "timing": benchmark(measurement(1.9, 2.1, 2.0)),
        "notes": ("input 1x3x8x8 is a guess",),
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]


def verification(**changes: object) -> Verification:
    row = OutputVerdict("out", "the example", output_error(), Level(1e-7, 1e-7), Level(1e-6, 1e-6), drift().outputs[0])
    fields = {
        "verdict": "same",
        "reason": "Rounding explains it.",
        "dtypes": ("float32", "float32"),
        "outputs": (row,),
        "trials": comparison().trials,
        "drift": drift(),
        "data": RealData(360, 64, 1.0, 0.9972, 0.9972),
        "notes": ("A note.",),
    }
    return Verification(**{**fields, **changes})  # type: ignore[arg-type]


def text(view: Iterable[object], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    for part in view:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def squeezed(shown: str) -> str:
    return "".join(shown.split())


def squeezed_words(shown: str) -> str:
    return " ".join(shown.split())


VIEWS = {
    "convert": lambda: convert_view(report()),
    "convert -v": lambda: convert_view(report(), verbose=True),
    "refused": lambda: plan_view(plan(*(Refusal(CODE, f"{LONG}.{index}", "a reason") for index in range(9)))),
    "verify": lambda: verify_view(
        verification(first_difference=FirstDifference("a", "b", "t", Level(1, 1), Level(0, 0)))
    ),
    "bench": lambda: bench_view(benchmark(measurement(1.9, 2.1, 2.0), cold=ColdCalls(1.0, 0.5))),
    "bench, in full": lambda: bench_view(full_benchmark()),
    "explain": lambda: explain_view(CODE, REFUSALS[CODE]),
    "topic": lambda: topic_view("limits", TOPICS["limits"]),
    "topics and codes": lambda: list_view(TOPICS, REFUSALS),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_nothing_is_cut_off_and_no_line_is_too_long(name: str, width: int) -> None:
    shown = text(VIEWS[name](), width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_long_module_paths_are_never_broken(width: int) -> None:
    lines = [line.rstrip() for line in text(plan_view(plan(), verbose=True), width).splitlines()]
    assert f"  {LONG}.0" in lines and f"  {LONG}.1" in lines


def test_a_conversion_says_what_matters_and_the_rest_on_demand() -> None:
    brief, full = (text(convert_view(report(), verbose=all), 80) for all in (False, True))
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
    assert text(convert_view(report(**changes), plan_path=plan_path)).splitlines()[-1] == last


def test_a_network_is_called_as_its_source_calls_it() -> None:
    source = report().input
    assert name_of(source) == "in"
    assert name_of(replace(source, model="timm:mobileone_s0")) == "mobileone_s0"
    assert name_of(replace(source, model="models/net.py:build")) == "in"


def test_a_block_that_is_the_whole_network_has_a_name() -> None:
    assert "(root)" in text(plan_view(Plan((site(path=""),), (), "cost", "f", None)))


def test_a_failed_proof_is_said_and_not_dressed_up() -> None:
    shown = text(convert_view(report(status="failed", proof=proof(1e-3), output=None, timing=None)))
    assert "note: In float64 the largest error is 1.0e-03" in shown
    assert "nothing was written" in shown
    assert "1.0e-03   1.0e-12   FAILED" in shown and "the whole network on 1 input: worst: the example" in shown


def test_a_mismatch_and_an_unmeasured_drift_are_said() -> None:
    trial = TrialComparison("size 1x1", ((1, 3, 1, 1),), mismatch="the shapes differ")
    failed = report(
        proof=proof(network=Comparison((trial,), 1e-12)), drift=Drift((), measured=False, problem="no half on this CPU")
    )
    shown = text(convert_view(failed))
    assert "note: size 1x1: the shapes differ." in shown and "FAILED" in shown
    assert "the drift was not measured: no half on this CPU" in shown


def test_refusals_of_one_kind_are_said_once_with_their_number() -> None:
    kinds = [Refusal(CODE, f"layer{index}", "why not") for index in range(9)]
    shown = text(plan_view(plan(*kinds, Refusal(CODE, "other", "another reason"), sites=0)))
    assert shown.count("why not") == 1
    assert "9 places" in shown
    assert "1 place" in shown
    assert "and 5 more" in shown
    assert squeezed(REFUSALS[CODE].hint) in squeezed(shown)


def test_a_declined_refusal_shows_both_costs() -> None:
    declined = Refusal(CODE, "here", "slower", Cost(macs=1000, launches=3), Cost(macs=9000, launches=1))
    assert "3 → 1 operators, 1.00 k → 9.00 k multiply-accumulates" in text(plan_view(plan(declined)))


def test_equal_branches_are_counted() -> None:
    shown = merged(site(branches=("conv 3x3 + norm", "conv 3x3 + norm", "conv 1x1 + norm")))
    assert shown == "2 of (conv 3x3 + norm), conv 1x1 + norm → 3x3"


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
    shown = text(bench_view(benchmark(measurement(low, high, factor))))
    assert shown.splitlines()[-1] == told
    assert f"({low:.2f} to {high:.2f})" in shown
    assert "use more --rounds" in shown


def test_timing_that_is_too_noisy_to_say_anything_says_only_that() -> None:
    noisy = measurement(0.4, 3.0, 1.7)
    shown = text(bench_view(benchmark(noisy)))
    assert shown.splitlines()[-1] == "timing too noisy to say anything at batch 1, 2 threads"
    assert not any(word in shown for word in ("1.7", "0.40", "3.00", "faster", "difference", "note:"))
    last = text(convert_view(report(timing=benchmark(noisy)))).splitlines()[-1]
    assert last == "in: 10 → 2 operators, exact to 3.0e-16, timing too noisy to say anything"


def test_the_notebooks_method_is_labelled() -> None:
    shown = text(bench_view(benchmark(measurement(1.9, 2.1, 2.0), cold=ColdCalls(1.0, 0.5))))
    assert "no measurement of speed" in squeezed_words(shown)


def test_a_verification_reports_real_data_and_what_was_refused() -> None:
    shown = text(verify_view(verification()))
    assert "the same class for 100 % of the samples" in shown
    assert "original 99.7 %, fused 99.7 %" in shown
    assert "1 input that not both networks are for (RuntimeError: too small)" in shown
    assert shown.rstrip().endswith("Same. Rounding explains it.")


def test_a_verification_shows_the_proof_where_there_is_one() -> None:
    shown = squeezed(text(verify_view(verification(proof=proof()), verbose=True), 120))
    assert "proof,float64thewholenetworkon1input3.0e-161.0e-12passed" in shown
    assert "float64weightsasstored" in shown
    assert "drift,float32thewholenetwork" in shown
    assert "outagreeswithinatol3.0e-16,ofnumbersupto1" in shown


def test_of_many_outputs_the_worst_are_shown_each_by_its_name() -> None:
    (row,) = verification().outputs
    rows = [replace(row, name=f"out[{index}]", error=output_error(10.0**-index)) for index in range(3, 9)]
    shown = text(verify_view(verification(outputs=tuple(rows), drift=None)), 120)
    table = shown[: shown.index("Compared")]
    assert [f"out[{index}]" in table for index in range(3, 9)] == [True] * 4 + [False] * 2


def test_each_kind_of_check_can_fail() -> None:
    weight = WeightProof("a.weight", "float32", (3,), 2, 7.5)
    bad_drift = SiteDrift("input 1x1", "float32", Level(1e-7, 1e-7), Level(1e-3, 1e-3), Level(1e-5, 1e-5), 80.0)
    sites = (SiteProof.of("a", comparison(), (weight,), None), SiteProof.of("b", comparison(1e-3), (), bad_drift))
    failed = proof(sites=sites, unproven=("c",))
    shown = squeezed(text(verify_view(verification(proof=failed)), 120))
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
    assert failed.place.path == "a" and failed.place.error.max == 7.5 and failed.place.after == ""


def test_real_data_that_flips_is_weighed() -> None:
    flips = Flips(3, 2, 0, 1e-9, 4e-7, (Flip("7/a.png", 7, 9, 7), Flip("12", -1, 3)))
    data = RealData(360, 360, 0.99, 0.95, 0.94, 0.98, 0.9999, 0.998, flips, without_class=1)
    shown = squeezed_words(text(verify_view(verification(data=data)), 200))
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
    unlabelled = RealData(360, 360, 0.99, None, None, flips=Flips(1, None, None, 1e-9, 1e-9))
    shown = squeezed_words(text(verify_view(verification(data=unlabelled)), 200))
    assert "1 sample in another class; the original preferred its own by 1.0e-09 of" in shown
    assert "accuracy" not in shown and "top-5" not in shown


def test_a_difference_names_the_place() -> None:
    place = FirstDifference("stages.1", "stages.0", "the example", Level(0.1, 0.2), Level(1e-6, 1e-6))
    shown = squeezed_words(text(verify_view(verification(verdict="different", first_difference=place))))
    assert "at stages.1, after stages.0, which still agrees: relative error 2.0e-01" in shown
    assert "Different." in shown


def test_could_not_tell_needs_no_outputs() -> None:
    shown = text(verify_view(verification(verdict="could-not-tell", outputs=(), trials=(), drift=None, data=None)))
    assert "Could not tell." in shown


def test_explanations_are_complete() -> None:
    for code, explanation in REFUSALS.items():
        shown = squeezed_words(text(explain_view(code, explanation), 120))
        assert explanation.title in shown
        assert squeezed(explanation.meaning) in squeezed(shown)
        assert squeezed(explanation.hint) in squeezed(shown)
        assert code in text(list_view(TOPICS, REFUSALS))


@pytest.mark.parametrize("name", TOPICS)
def test_topics_are_shown_whole(name: str) -> None:
    topic = TOPICS[name]
    shown = squeezed(text(topic_view(name, topic), 80))
    assert all(squeezed(part) in shown for part in (topic.title, topic.opening, *topic.points.values()))
    assert f"{name} {topic.title}" in squeezed_words(text(list_view(TOPICS, REFUSALS), 80))  # on one line


def strict(document: str) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(document, parse_constant=refuse)  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", [3e-16, math.inf, math.nan])
def test_the_report_is_strict_json_with_a_schema(error: float) -> None:
    found = strict(to_json(envelope("conversion", report(proof=proof(error)).to_dict())))
    assert found["schema"] == 1
    assert found["kind"] == "repfuse.conversion"
    assert {"status", "environment", "input", "output", "plan", "proof", "drift", "timing", "notes"} <= set(found)
    assert Plan.from_dict(found["plan"]) == plan()  # type: ignore[arg-type]


def test_a_report_without_its_optional_parts_is_json_too() -> None:
    found = strict(to_json(report(proof=None, drift=None, output=None, timing=None).to_dict()))
    assert found["proof"] is found["drift"] is found["output"] is found["timing"] is None


def test_what_is_not_json_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"error": math.nan})


def test_a_speed_up_that_is_only_known_within_a_wide_range_gets_no_number() -> None:
    shown = squeezed_words(text(bench_view(benchmark(measurement(5.21, 235.6, 215.4)))))
    assert "unsteady (5.21 to 236)" in shown
    assert "faster, unsteady (5.2 to 235.6) at batch 1" in shown
    assert "215" not in shown


def test_what_was_run_of_the_file_is_said() -> None:
    found = Verified(
        "ONNX Runtime 1.32",
        ("d0x3x8x8",),
        ("the example", "batch 2"),
        ("size 1x1",),
        *(2e-7, 1e-7, 1e-6),
        where="a fresh process",
    )
    made = report(output=Output("out.onnx", "sha256:" + "2" * 64, "onnx", found))
    shown = squeezed(text(convert_view(made, verbose=True), 120))
    for part in (
        "inafreshprocess;ONNXRuntime1.32on2inputs:relativeerror2.0e-07",
        "(theoriginal'sown1.0e-07,allowed1.0e-06)",
        "takesd0x3x8x8;doesnottakesize1x1",
    ):
        assert part in shown, part
    assert made.to_dict()["output"]["verified"]["compared"] == ["the example", "batch 2"]


def test_a_file_that_was_read_again_is_said_with_where_and_how_much_of_it() -> None:
    where = "this process, because this program is no Python that could be started again"
    found = Verified("PyTorch 2.13", (), ("the example",), (), where=where, tensors=12, identical=True, seconds=2.0)
    made = report(output=Output("o.pt", "sha256:" + "2" * 64, "pt", found))
    assert f"o.pt (pt, read again in {where})" in squeezed_words(text(convert_view(made), 300))
    shown = squeezed_words(text(convert_view(made, verbose=True), 300))
    assert (
        f"verified in {where}; 12 tensors the same bit by bit; PyTorch 2.13 on 1 input: the outputs are those of the "
        "proven network, bit by bit; took 2.00 s"
    ) in shown
    unrun = report(output=Output("o", "s" * 19, "pt", replace(found, compared=())))
    assert "not run" in text(convert_view(unrun, verbose=True))
