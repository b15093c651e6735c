"""The benchmark where people deploy: other runtimes, copies in other dtypes, place by place, against an earlier run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from support.folded import example, folded, network
from support.ticks import Ticks
from test_report_views import bench_document, measurement, report
from test_report_views import benchmark as bench_data
from torch import nn
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from repfuse import Plan, RepfuseError, bench, fuse, load, rewrite, verify
from repfuse.benching import benchmark, sites
from repfuse.benching.results import Gain, Ratio, SiteTiming, Timing
from repfuse.benching.timing import judge
from repfuse.cli.app import app
from repfuse.planning.replaying import Choice, choose
from repfuse.report.schema import changes, to_json

OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) if name == "compile" else name
    for name, (_, needed, _) in benchmark.RUNTIMES.items()
    if all(importlib.util.find_spec(package) for package in needed)
]


MODULE = SAMPLES / "repvgg_digits.pt"
MODEL, WRONG = network(2), network(2, seed=1)


def timed(original: nn.Module, fused: nn.Module, **settings):
    return bench(original, fused, example(), rounds=8, clock=Ticks(), **settings)


# --- runtimes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runtimes find what one of them had exported: an export takes longer than all else about them."""
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "eager"])
def test_each_runtime_is_there(name, exports):
    """And computes what the network does: another one is not timed."""
    assert benchmark.started(name, MODEL, example(), 1, exports)
    start, needed, extra = benchmark.RUNTIMES[name]
    runtimes_of = {name: (lambda _model, *rest: start(WRONG, *rest), needed, extra)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "RUNTIMES", runtimes_of)
        with pytest.raises(RepfuseError, match="something else"):
            benchmark.started(name, MODEL, example(), 1, exports)


def test_a_network_is_exported_once_for_all_runtimes(exports):
    made = []
    for name in ("onnxruntime", "openvino"):
        if name in OTHERS:
            benchmark.started(name, MODEL, example(), 1, exports)
            made.append([(path.name, path.stat().st_mtime_ns) for path in exports.glob(f"{id(MODEL)}*")])
    assert len(made[0]) == 1 and all(each == made[0] for each in made)


def test_both_networks_are_timed_in_each_runtime_and_against_eager():
    model = network(1)
    found = timed(model, folded(model), runtimes=("eager", "onnxruntime"))
    eager, other = found.measurements
    assert (eager.runtime, other.runtime) == ("eager", "onnxruntime") and not found.left_out
    assert eager.over_eager is None and other.over_eager.value == pytest.approx(1, rel=1e3)


@pytest.mark.slow  # the compiler of torch.compile takes seconds
def test_a_compiled_network_is_compiled_for_each_batch_size():
    model = network(1)
    found = timed(model, folded(model), runtimes=("compile",), batch_sizes=range(1, 11), threads=(1,))
    assert len(found.measurements) == 10 and not found.left_out


def test_a_runtime_that_is_not_there_is_named_and_the_others_are_timed(monkeypatch):
    start, _, extra = benchmark.RUNTIMES["openvino"]
    monkeypatch.setitem(benchmark.RUNTIMES, "openvino", (start, ("no_such_package",), extra))
    found = timed(network(1), network(1), runtimes=("openvino", "eager"))
    assert [entry.runtime for entry in found.measurements] == ["eager"]
    assert found.left_out == ("openvino: no_such_package not installed: pip install 'repfuse[openvino]'",)
    with pytest.raises(RepfuseError, match="nothing to time") as caught:
        timed(network(1), network(1), runtimes=("openvino",))
    assert "no_such_package" in caught.value.why


def test_a_runtime_that_refuses_a_network_is_named():
    class Prints(nn.Module):
        def forward(self, x):
            return x * len(str(x.sum().item()))

    found = timed(Prints(), Prints(), runtimes=("eager", "onnxruntime"))
    (reason,) = found.left_out
    assert reason.startswith("onnxruntime: ") and len(found.measurements) == 1


# --- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copies_are_timed_in_another_dtype_and_layout(dtype):
    seen = []

    class Spy(nn.Conv2d):
        def forward(self, x):
            seen.append((x.dtype, self.weight.dtype, x.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x)

    model = Spy(3, 4, 3)
    found = timed(model, model, dtype=dtype, channels_last=True, device="cpu", batch_sizes=(2,))
    assert found.dtype == str(dtype).removeprefix("torch.") and set(seen) == {(dtype, dtype, True)}
    assert model.weight.dtype is torch.float32 and model.weight.is_contiguous()


def test_a_device_that_is_not_there_is_bad_input():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RepfuseError, match="cannot be put on cuda"):
        timed(network(1), network(1), device="cuda")


# --- the floor ---------------------------------------------------------------------------------------------------


def test_the_floor_is_the_time_of_as_many_products_in_a_matrix_product():
    model = network(2, width=8)
    found = timed(model, folded(model), batch_sizes=(1, 4))
    for entry in found.measurements:
        macs = found.before.macs * entry.batch_size
        product = 0.01  # seconds that the clock gives each timing, of one call
        assert entry.original.floor == entry.fused.floor == pytest.approx(product * macs / benchmark.SIDES["cpu"] ** 3)
        assert entry.fused.of_machine == pytest.approx(entry.fused.floor / entry.fused.median)


def test_each_input_has_rows_and_a_floor_of_its_own():
    model = network(2, width=8)
    found = timed(model, folded(model), more_inputs=[example(size=18)], batch_sizes=(1, 4))
    assert [entry.shapes for entry in found.measurements] == [
        ((size, 3, side, side),) for side in (9, 18) for size in (1, 4)
    ]
    floors = [entry.fused.floor for entry in found.measurements]
    assert found.shapes == ((1, 3, 9, 9),) and floors[1] / floors[0] == pytest.approx(4) and floors[2] > 2 * floors[0]
    alone = timed(model, folded(model))
    assert [entry.shapes for entry in alone.measurements] == [()]
    assert [change.now.shapes for change in changes(found, alone)] == [((1, 3, 9, 9),)]
    assert len(changes(found, found)) == 4


# --- place by place ----------------------------------------------------------------------------------------------


def test_each_place_is_timed_before_and_after():
    checkpoint = load(SAMPLES / "repvgg_digits.pt")
    result = fuse(checkpoint.module, checkpoint.example_inputs)
    networks = checkpoint.module, result.module
    found = sites.time_sites(*networks, result.plan, checkpoint.example_inputs, seconds=0, clock=Ticks())
    assert {site.path for site in found} == {site.path for site in result.plan.sites}
    assert all(site.predicted > 1 and site.before > 0 and site.speedup.low <= site.speedup.high for site in found)


class Operations(TorchFunctionMode):
    """A clock for which each function of torch takes a millisecond, and reading it a millionth of that.

    Where it goes by ``weights``, a convolution takes a microsecond for each of those that it has.
    """

    def __init__(self, *, weights: bool = False) -> None:
        super().__init__()
        self.now, self.weights = 0.0, weights

    def __torch_function__(self, func, types, args=(), kwargs=None):
        convolves = self.weights and func is torch.conv2d
        self.now += 1e-6 * args[1].numel() if convolves else 1e-3
        return func(*args, **(kwargs or {}))

    def __call__(self) -> float:
        self.now += 1e-9
        return self.now


@pytest.mark.parametrize("most", [1, 2, 10])
def test_what_the_network_gains_by_each_place_adds_up_to_what_it_gains(most, monkeypatch):
    monkeypatch.setattr(sites, "MOST_STEPS", most)
    checkpoint = load(SAMPLES / "repvgg_digits.pt")
    result = fuse(checkpoint.module, checkpoint.example_inputs)
    with Operations() as clock:
        networks = checkpoint.module, result.module
        found = sites.time_sites(*networks, result.plan, checkpoint.example_inputs, seconds=0, clock=clock)
        start = clock()
        checkpoint.module(*checkpoint.example_inputs)
        middle = clock()
        result.module(*checkpoint.example_inputs)
        gained = middle - start - (clock() - middle)
    assert [site.output for site in found] == [site.output for site in result.plan.sites]
    assert sum(site.gain.value for site in found) == pytest.approx(gained, rel=1e-3) and gained > 0.02
    assert all(0 < site.gain.low <= site.gain.value <= site.gain.high for site in found)


seconds = st.floats(1e-6, 1.0)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=9), st.floats(-1, 1), st.floats(0, 1))
def test_a_gain_that_places_share_is_shared_out_without_a_rest(both, value, wide):
    step = [SiteTiming("", "", "", None, one, other, Ratio(1, 1, 1)) for one, other in both]
    found = [site.gain for site in sites.shared_out(Gain(value, value - wide, value + wide), step)]
    for end, whole in (("value", value), ("low", value - wide), ("high", value + wide)):
        assert sum(getattr(gain, end) for gain in found) == pytest.approx(whole, abs=1e-9)
    assert all(gain.low <= gain.value <= gain.high for gain in found)


def test_the_plan_of_another_network_times_nothing():
    checkpoint = load(SAMPLES / "repvgg_digits.pt")
    plan = fuse(checkpoint.module, checkpoint.example_inputs).plan
    with pytest.raises(RepfuseError):
        sites.time_sites(network(1), network(1), plan, example(), seconds=0, clock=Ticks())


# --- both ways ---


def separable() -> nn.Module:
    """A depthwise 3x3 and a 1x1: at 24 pixels the law of cost cannot tell one layer from two."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    model = nn.Sequential(
        depthwise, nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    )
    for norm in (model[1], model[3]):
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("policy", ["cost", "always"])
@pytest.mark.parametrize(("weights", "kernels"), [(False, ["3x3"]), (True, ["3x3 depthwise", "1x1"])])
def test_what_is_in_doubt_is_timed_as_one_layer_and_in_parts(policy, weights, kernels):
    model, inputs = separable(), (torch.randn(1, 16, 24, 24),)
    choice = Choice(policy)
    found = choose(model, inputs, choice)
    with Operations(weights=weights) as clock:
        tuned = sites.tune(model, found, choice, seconds=0, clock=clock)
    assert [site.kernel for site in tuned.plan.sites] == kernels, tuned
    (measured,), (said,) = tuned.plan.measured, tuned.said
    assert (measured.speedup > 1) == (not weights) and ("left in parts" in said) == weights
    assert any(str(measured) == refusal.reason for refusal in tuned.plan.refusals) == weights
    again = Plan.from_dict(json.loads(tuned.plan.to_json()))
    assert again == tuned.plan
    fused = rewrite(model, again)
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == len(kernels)
    assert verify(model, fused, inputs, plan=again).verdict == "same"


class Branches(nn.Module):
    """A depthwise 3x3 beside a 1x1: at 24 pixels, one layer or two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.conv1 = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 24, 1)

    def forward(self, x):
        return self.conv3(x) + self.conv1(x)


@pytest.mark.parametrize("policy", ["cost", "always"])
@pytest.mark.parametrize(("weights", "merged"), [(False, 1), (True, 0)])
def test_branches_in_doubt_are_timed_as_one_layer_and_apart(policy, weights, merged):
    model, inputs, choice = nn.Sequential(Branches(), nn.ReLU()).eval(), (torch.randn(1, 24, 24, 24),), Choice(policy)
    with Operations(weights=weights) as clock:
        tuned = sites.tune(model, choose(model, inputs, choice), choice, seconds=0, clock=clock)
    assert len(tuned.plan.sites) == merged and len(tuned.said) == 1, tuned


def test_what_is_left_out_is_not_timed():
    model, inputs = nn.Sequential(separable(), separable()), (torch.randn(1, 16, 24, 24),)
    choice = Choice(exclude=("1",))
    with Operations() as clock:
        tuned = sites.tune(model, choose(model, inputs, choice), choice, seconds=0, clock=clock)
    assert [site.kernel for site in tuned.plan.sites] == ["3x3"] and len(tuned.said) == 1
    assert all(refusal.where.startswith("1") for refusal in tuned.plan.refusals)


# --- the notebook ---


def test_the_notebook_is_done_again_cold_and_warm_and_without_its_padding():
    found = benchmark.experiments(rounds=8, seconds=0, clock=Ticks())
    assert [each.shape for each in found] == [(1, *shape) for shape in benchmark.NOTEBOOK_SHAPES]
    assert all((each.cold, each.warm.value, each.integers.value) == pytest.approx((1, 1, 1)) for each in found)


def test_the_notebook_needs_no_files(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "NOTEBOOK_SHAPES", ((2, 28, 28), (16, 7, 7)))
    done = CliRunner().invoke(app, ["bench", "--notebook"])
    shown = " ".join(done.stdout.split())
    assert done.exit_code == 0 and "1x2x28x28" in shown and "It is no measurement of speed." in shown, done.stderr


# --- against an earlier run --------------------------------------------------------------------------------------

NOISE = [1, 1.02, 0.98, 1.01, 0.99, 1, 1.03, 0.97]


@cache
def plain():
    return timed(MODEL, MODEL)


def of(original, fused, runtime: str = "eager"):
    """Return a benchmark with these times of both networks."""
    times = (Timing.of(tuple(times), 1) for times in (original, fused))
    entry = judge(*times, batch_size=1, threads=1, rounds=len(fused), runtime=runtime)
    return replace(plain(), measurements=(entry,))


def run(original: float, fused: float, runtime: str = "eager"):
    return of(*([seconds * noise for noise in NOISE] for seconds in (original, fused)), runtime)


@pytest.mark.parametrize(
    ("now", "slower"),
    [
        ((4, 1), False),
        ((4, 1.2), True),
        ((8, 2), False),  # the machine alone
        ((4, 0.5), False),
        ((2, 1), False),  # only the original changed
        ((8, 3), True),
    ],
)
def test_slower_is_what_the_machine_does_not_explain(now, slower):
    (change,) = changes(run(*now), run(4, 1))
    assert change.slower is slower and change.ratio.value == pytest.approx(now[1])


def test_only_the_same_settings_are_compared():
    assert not changes(run(4, 1, "openvino"), run(4, 1))


def compared_with(text: str, tmp_path: Path) -> str:
    """Compare with what is no benchmark; return what the command says."""
    path = tmp_path / "baseline.json"
    path.write_bytes(text.encode("latin-1"))
    done = CliRunner().invoke(app, ["bench", str(MODULE), str(MODULE), "--compare", str(path)])
    assert done.exit_code == 2 and "baseline.json is not a report" in done.stderr, done.output
    return done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "x",
        '{"schema": 1, "kind": "repfuse.benchmark", "measurements": [1]}',
        '{"schema": 1, "kind": "repfuse.plan"}',
        to_json(report()),
        "\xff",
    ],
)
def test_what_is_no_benchmark_is_bad_input(tmp_path, text):
    assert "--save" in compared_with(text, tmp_path).partition(" do: ")[2]


def test_a_benchmark_with_a_hole_is_bad_input(tmp_path):
    entry = measurement(1.9, 2.1, 2.0)
    del entry["fused"]
    assert "fused: it is missing" in compared_with(to_json(bench_document(bench_data(entry))), tmp_path)


times = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20)


@given(times, times, st.floats(0.1, 10))
def test_the_ratio_of_two_runs_scales_with_one_of_them(first, second, factor):
    then = of([1.0] * len(second), second)
    scaled = [factor * time for time in first]
    one, other = (changes(of([1.0] * len(now), now), then)[0].ratio for now in (first, scaled))
    assert other.value == pytest.approx(factor * one.value) and other.low == pytest.approx(factor * one.low)


@given(st.floats(1.5, 9))
def test_a_drift_of_both_networks_is_said(factor):
    drifting = Timing.of((*[1.0] * 10, *[factor] * 10), 1)
    (said,) = judge(drifting, drifting, batch_size=1, threads=1, rounds=20).warnings
    assert said.startswith(f"The machine got {factor - 1:.0%} slower during the measurement")
    steady = Timing.of((1.0,) * 20, 1)
    said = judge(drifting, steady, batch_size=1, threads=1, rounds=20).warnings
    assert not any("during the measurement" in text for text in said)


# --- the command -------------------------------------------------------------------------------------------------


def test_a_gate_on_speed(cli, digits_fused: Path, tmp_path: Path) -> None:
    fused, baseline = digits_fused, tmp_path / "baseline.json"
    options = ("--threads", "1", "--rounds", "8", "--budget", "1s")
    done = cli("bench", MODULE, fused, *options, "--sites", "--save", baseline)
    assert done.returncode == 0 and "each place by itself" in done.stdout, done.stderr
    data = json.loads(baseline.read_text())
    assert len(data["sites"]) == 5 and data["measurements"][0]["runtime"] == "eager"
    for entry in data["measurements"]:  # as if the fused network had been ten times as fast then
        entry["fused"]["times"] = [time / 10 for time in entry["fused"]["times"]]
    baseline.write_text(json.dumps(data))
    done = cli("bench", MODULE, fused, *options, "--compare", baseline)
    assert done.returncode == 1 and "Slower at 1 setting" in done.stdout


def test_several_inputs_are_timed_saved_and_compared(cli, digits_fused: Path, tmp_path: Path) -> None:
    fused, baseline = digits_fused, tmp_path / "baseline.json"
    inputs = ("--input", "1x1x8x8", "--input", "1x1x16x16")
    options = ("--threads", "1", "--rounds", "8", "--budget", "1s")
    done = cli("bench", MODULE, fused, *inputs, *options, "--batch-size", "2", "--save", baseline)
    assert done.returncode == 0 and "2x1x16x16" in done.stdout, done.stderr
    done = cli("bench", MODULE, fused, *inputs, *options, "--batch-size", "2", "--compare", baseline)
    assert "Since the earlier run" in done.stdout and "at 2x1x16x16, 1 thread" in done.stdout, done.stderr
    done = cli("bench", MODULE, fused, "--input", "1x1x9x9", *options, "--compare", baseline)
    assert done.returncode == 2 and "no times to compare" in done.stderr
    done = cli("check", fused, "--original", MODULE, "--baseline", baseline, "--quick")
    assert done.returncode in (0, 1) and "no times" not in done.stderr, done.stderr
    done = cli("bench", MODULE, fused, *inputs[:2], "--input", "1x3x8x8", *options)
    assert done.returncode == 2 and "cannot run on the inputs" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--runtime", "tensorrt"), "no runtime 'tensorrt'"),
        (("--budget", "soon"), "no time"),
        (("--dtype", "int8"), "no dtype"),
        (("--sites", "--channels-last"), "--sites times the network as it is"),
    ],
)
def test_wrong_options_are_said_before_anything_is_read(cli, options, said) -> None:
    done = cli("bench", MODULE, MODULE, *options)
    assert done.returncode == 2 and said in done.stderr


def test_what_is_slower_merged_is_left_alone_on_demand(cli, tmp_path: Path) -> None:
    """A depthwise 3x3 and a 1x1 as one dense 3x3: nine times the work. Two 1x1 in a row are one at half of it."""
    torch.manual_seed(0)
    slower = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.Conv2d(64, 64, 1))
    model = nn.Sequential(slower, nn.ReLU(), nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1))).eval()
    source, fused = tmp_path / "model.pt", tmp_path / "fused.pt"
    torch.save(model, source)
    done = cli("convert", source, fused, "--input", "1x64x24x24", "--policy", "always", "--tune", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (site,), (refusal,) = report["plan"]["sites"], report["plan"]["refusals"]
    assert site["path"].startswith("2") and refusal["code"] == "cost" and "measured to be 0." in refusal["reason"]
    assert any("left in parts" in note for note in report["notes"])


@pytest.mark.slow  # a minute
def test_a_network_is_no_faster_than_itself() -> None:
    """An A/A test in real time: 190 of 200 say no difference."""
    model = network(2, width=16)
    found = [bench(model, network(2, width=16), example(), rounds=12, threads=(1,)) for _ in range(200)]
    assert sum(each.measurements[0].verdict == "no difference" for each in found) >= 190
