"""The benchmark. No test here depends on real time: the clock is made of numbers."""

from __future__ import annotations

import json
import random
import statistics
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from support.folded import example, folded, network
from support.ticks import SHORTEST, Ticks
from torch import nn

from repfuse import RepfuseError, bench, fuse, load
from repfuse.benching.results import Timing
from repfuse.benching.timing import batched, device_clock, judge, ratio_of_medians, time_rounds

times = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30)
pairs = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=2, max_size=30)


# --- statistics --------------------------------------------------------------------------------------------------


@given(pairs)
def test_the_ratio_is_that_of_the_medians_and_its_interval_is_ordered(rounds):
    first, second = zip(*rounds, strict=True)
    ratio = ratio_of_medians(first, second)
    assert ratio.value == pytest.approx(statistics.median(first) / statistics.median(second))
    assert ratio.low <= ratio.high


@given(times, st.floats(0.1, 10))
def test_a_network_that_is_slower_by_a_factor_in_each_round_is_slower_by_just_that(first, factor):
    ratio = ratio_of_medians(first, [time / factor for time in first])
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((factor, factor, factor))


@given(pairs)
def test_exchanging_the_networks_inverts_the_ratio(rounds):
    first, second = zip(*rounds, strict=True)
    there, back = ratio_of_medians(first, second), ratio_of_medians(second, first)
    assert there.value == pytest.approx(1 / back.value)


@given(pairs)
def test_the_unit_of_time_does_not_matter(rounds):
    first, second = zip(*rounds, strict=True)
    seconds = ratio_of_medians(first, second)
    millis = ratio_of_medians([1e3 * time for time in first], [1e3 * time for time in second])
    assert (seconds.low, seconds.high) == pytest.approx((millis.low, millis.high))


def test_the_interval_holds_the_truth_at_about_its_rate():
    draw, truth, held = random.Random(0), 1.3, 0
    for _ in range(300):
        second = [draw.lognormvariate(0, 0.1) for _ in range(30)]
        ratio = ratio_of_medians([truth * draw.lognormvariate(0, 0.1) for _ in second], second)
        held += ratio.low <= truth <= ratio.high
    assert 0.91 <= held / 300 <= 0.99  # the nominal 0.95, give or take three standard errors


def test_disturbances_that_hit_a_whole_round_cancel():
    draw = random.Random(0)
    machine = [draw.lognormvariate(0, 0.5) for _ in range(30)]
    first = [1.2 * speed * draw.lognormvariate(0, 0.01) for speed in machine]
    second = [speed * draw.lognormvariate(0, 0.01) for speed in machine]
    paired = ratio_of_medians(first, second)
    broken = ratio_of_medians(first, draw.sample(second, len(second)))
    assert 1.1 < paired.low < paired.high < 1.3
    assert paired.high - paired.low < (broken.high - broken.low) / 2


def test_a_few_slow_rounds_do_not_move_the_interval():
    ratio = ratio_of_medians([1.0] * 30 + [1000.0], [1.0] * 31)
    assert (ratio.low, ratio.value, ratio.high) == (1, 1, 1)


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_one_time_is_no_sample(first, second):
    with pytest.raises(ValueError, match="pairs"):
        ratio_of_medians(first, second)


def test_outliers_are_slow_times_far_from_the_rest():
    usual = [1.0, 1.01, 1.02, 0.99, 0.98, 1.0, 1.01]

    def said(*times):
        return _judge(times, times).warnings

    whose = ("original", "fused network")
    starts = [f"2 of 9 timings of the {each} are outliers" for each in whose]
    assert [text.partition(",")[0] for text in said(*usual, 5.0, 7.0) if "outliers" in text] == starts
    for fine in (usual, [*usual, 0.1], [1.0] * 9):
        assert said(*fine) == ()


# --- timing ------------------------------------------------------------------------------------------------------


class Machine:
    """A clock that calls move forward, and a record of which was called when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def _time(machine: Machine, first: float, second: float, rounds: int = 8, seconds: float = 1e9):
    calls = machine.call("a", first), machine.call("b", second)
    return time_rounds(calls, machine.clock, rounds=rounds, seconds=seconds, progress=lambda _fraction: None)


def test_the_times_are_those_of_the_calls():
    times = _time(Machine(), 0.5, 0.25)
    assert times.times == (pytest.approx((0.5,) * 8), pytest.approx((0.25,) * 8))
    assert times.calls == (1, 1)


def test_the_order_is_drawn_and_then_turned_around_after_a_warm_up():
    machine = Machine()
    names, rounds = "abcd", 40
    calls = [machine.call(name, 1.0) for name in names]
    time_rounds(calls, machine.clock, rounds=rounds, seconds=1e9, progress=lambda _fraction: None)
    warm_up, timed = "".join(machine.calls[: -4 * rounds]), "".join(machine.calls[-4 * rounds :])
    assert warm_up == "aabbccdd"
    orders = [timed[start : start + 4] for start in range(0, len(timed), 4)]
    assert all(
        one == other[::-1] and set(one) == set(names) for one, other in zip(orders[::2], orders[1::2], strict=True)
    )
    assert len(set(orders)) > 10


def test_what_is_not_warm_yet_is_called_until_it_is():
    machine = Machine()
    seconds = iter([5.0, 4.0, 3.0, 2.0, 1.0])

    def cold() -> None:
        machine.calls.append("a")
        machine.now += next(seconds, 1.0)

    times = time_rounds([cold], machine.clock, rounds=8, seconds=1e9, progress=lambda _fraction: None)
    assert times.times == ((1.0,) * 8,)


def test_a_timing_of_short_calls_holds_as_many_as_last_long_enough():
    times = _time(Machine(), SHORTEST / 9.5, SHORTEST / 2.5)
    assert times.calls == (10, 3)
    assert times.times[0] == pytest.approx((SHORTEST / 9.5,) * 8)


def test_one_slow_call_does_not_spoil_the_calibration():
    machine = Machine()
    slow = iter([1.0])
    call = machine.call("a", SHORTEST / 9.5)

    def first() -> None:
        call()
        machine.now += next(slow, 0.0)

    times = time_rounds([first, first], machine.clock, rounds=8, seconds=9, progress=lambda _fraction: None)
    assert times.calls == (10, 10)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 8), (27.5, 12), (1e9, 40)])
def test_time_is_bounded_and_the_rounds_stay_balanced(seconds, rounds):
    assert len(_time(Machine(), 1.0, 1.0, rounds=40, seconds=seconds).times[0]) == rounds


def test_a_clock_that_stands_still_ends_too():
    times = _time(Machine(), 0.0, 0.0, rounds=8)
    assert len(times.times[0]) == 8


class Device:
    """A device that works while the host goes on, and a host that is told late that it has finished."""

    LATE = 1e-3

    def __init__(self) -> None:
        self.host = self.done = 0.0

    def launch(self, seconds: float) -> None:
        self.done = max(self.host, self.done) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.done) + self.LATE

    def event(self, *, enable_timing: bool) -> Device.Event:
        assert enable_timing
        return Device.Event(self)

    class Event:
        def __init__(self, device: Device) -> None:
            self.device = device

        def record(self) -> None:
            self.at = max(self.device.host, self.device.done)

        def elapsed_time(self, other: Device.Event) -> float:
            return torch.tensor(1e3 * (other.at - self.at), dtype=torch.float32).item()


def test_on_cuda_the_time_is_the_devices(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: device.synchronize())
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    clock = device_clock(lambda: 0.0, torch.device("cuda"))
    device.host += 1e6  # seconds, of which single precision would keep no millisecond
    clock()
    calls = [lambda: device.launch(0.25), lambda: device.launch(0.02)]
    found = time_rounds(calls, clock, rounds=8, seconds=1e9, progress=lambda _fraction: None)
    assert found.times == (pytest.approx((0.25,) * 8, rel=1e-6), pytest.approx((0.02,) * 8, rel=1e-6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_real_device_the_clock_counts_all_that_was_launched():
    one = torch.ones(4096, 4096, device="cuda")
    clock = device_clock(time.perf_counter, one.device)
    times = [
        time_rounds([partial(torch.mm, one, one)], each, rounds=8, seconds=5, progress=lambda _fraction: None)
        for each in (clock, waiting(one.device))
    ]
    ours, waited = (statistics.median(each.times[0]) for each in times)
    assert 0.5 * waited < ours < 1.1 * waited


def waiting(device: torch.device):
    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


# --- judgement ---------------------------------------------------------------------------------------------------


def _judge(first, second, calls=(1, 1), rounds=None):
    both = [Timing.of(tuple(times), count) for times, count in zip((first, second), calls, strict=True)]
    return judge(*both, batch_size=1, threads=1, rounds=rounds or len(first))


def test_the_verdict_follows_the_interval():
    noise = [1, 1.02, 0.98, 1.01, 0.99, 1, 1.03, 0.97]
    assert _judge([2 * time for time in noise], noise).verdict == "faster"
    assert _judge(noise, [2 * time for time in noise]).verdict == "slower"
    assert _judge(noise, noise[::-1]).verdict == "no difference"


@pytest.mark.parametrize(
    ("times", "calls", "rounds", "said"),
    [
        ([9.0, *[1, 1.01] * 5], (1, 1), None, "not warm"),
        ([1, 9.0, *[1, 1.01] * 5], (1, 1), None, "quiet machine"),
        ([1e-5, 1.1e-5] * 5, (1000, 1000), None, "microseconds"),
        ([1e-4, 1.1e-4] * 5, (1, 1), None, "too short"),
        ([1, 1.01] * 2, (1, 1), 40, "4 of 40"),
    ],
)
def test_what_to_be_wary_of_is_said(times, calls, rounds, said):
    assert said in " ".join(_judge(times, times, calls, rounds).warnings)


def test_a_good_measurement_has_no_warnings():
    assert _judge([1, 1.01] * 10, [1, 1.01] * 10).warnings == ()


# --- the benchmark -----------------------------------------------------------------------------------------------


def test_costs_before_and_after():
    original = network(2, width=8)
    result = bench(original, folded(original), example(size=9), rounds=8, clock=Ticks())
    convolutions, head = 81 * 8 * 27 + 81 * 8 * 72, 80
    assert result.before.macs == result.after.macs == convolutions + head
    assert result.before.parameters == 8 * 27 + 8 * 72 + 4 * 8 + 90
    assert result.after.parameters == 8 * 27 + 8 * 72 + 2 * 8 + 90
    buffers = 4 * (4 * 8) + 2 * 8  # running statistics in float32, two counters in int64
    assert result.before.weight_bytes == 4 * result.before.parameters + buffers
    assert result.before.peak_bytes is None and result.shapes == ((1, 3, 9, 9),)
    assert (result.device, result.dtype) == ("cpu", "float32")


def test_a_measurement_per_batch_size_and_thread_count():
    before = torch.get_num_threads()
    seen: list[tuple[int, int]] = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append((len(x), torch.get_num_threads()))
            assert torch.is_inference_mode_enabled() or len(x) == 1  # the counter of costs, at the example's batch
            return x

    result = bench(Watch(), Watch(), example(), batch_sizes=(1, 4), threads=(1, 2), rounds=8, clock=Ticks())
    settings = [(entry.batch_size, entry.threads) for entry in result.measurements]
    assert settings == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert set(seen) == set(settings)
    assert torch.get_num_threads() == before


def test_the_networks_keep_their_modes_and_their_state():
    pair = network(2).train(), network(2).train()
    state = {name: value.clone() for name, value in pair[0].state_dict().items()}
    for each in pair:
        each[0][1].eval()
    bench(*pair, example(), rounds=8, clock=Ticks())
    for each in pair:
        assert each.training and each[0][4].training and not each[0][1].training
        assert all(torch.equal(value, state[name]) for name, value in each.state_dict().items())


def test_cold_calls_come_first_and_say_what_they_are():
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    result = bench(Named("original"), Named("fused"), example(), rounds=8, cold=True, clock=Ticks())
    assert calls[:2] == ["original", "fused"]
    assert result.cold.original == pytest.approx(0.01) and "no measurement" in result.cold.note
    assert bench(Named("a"), Named("b"), example(), rounds=8, clock=Ticks()).cold is None


def test_another_dtype_gets_inputs_of_its_own():
    original = network(1)
    result = bench(original, network(1).to(torch.float64), example(), rounds=8, clock=Ticks())
    assert result.dtype == "float32 and float64"


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 7}, {"batch_sizes": [0]}, {"batch_sizes": []}, {"threads": [-1]}, {"threads": [2, 0]}],
)
def test_a_number_that_makes_no_sense_is_bad_input(wrong):
    with pytest.raises(RepfuseError, match="cannot be"):
        bench(network(1), network(1), example(), clock=Ticks(), **wrong)


def test_an_input_that_does_not_fit_is_bad_input():
    with pytest.raises(RepfuseError, match="cannot run") as caught:
        bench(network(1), network(1), (torch.randn(1, 4, 9, 9),), clock=Ticks())
    assert caught.value.hint


def test_batches_repeat_or_cut_off_the_samples():
    image, scale, flag = torch.arange(3.0).reshape(3, 1), torch.ones(2), "kept"
    assert batched((image, scale, flag), 5)[0].flatten().tolist() == [0, 1, 2, 0, 1]
    assert batched((image, scale, flag), 2)[0].flatten().tolist() == [0, 1]
    assert batched((image, scale, flag), 2)[1] is scale and batched((image, scale, flag), 2)[2] == "kept"


def test_the_result_is_json():
    result = bench(network(1), network(1), example(), rounds=8, cold=True, clock=Ticks())
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["measurements"][0]["verdict"] == result.measurements[0].verdict


def test_progress_ends_at_one():
    seen: list[float] = []
    report = seen.append
    bench(
        network(1),
        network(1),
        example(),
        batch_sizes=(1, 2),
        rounds=8,
        clock=Ticks(),
        progress=lambda _stage, fraction: report(fraction),
    )
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_the_plan_and_the_benchmark_count_multiply_accumulates_alike():
    """Of a network that is sites alone, with normalisations, sums and skips: what no convolution does is no count."""
    checkpoint = load(SAMPLES / "notebook_block.pt")
    result = fuse(checkpoint.module, checkpoint.example_inputs)
    found = bench(checkpoint.module, result.module, checkpoint.example_inputs, seconds=0.0, rounds=8)
    before, after = (sum(getattr(site, side).macs for site in result.plan.sites) for side in ("before", "after"))
    assert before > after > 0
    assert (found.before.macs, found.after.macs) == (before, after)
