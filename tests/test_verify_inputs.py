"""The inputs of a verification: what each kind brings out, what each effort costs, and that no network escapes them."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from support.folded import example, folded, network
from torch import Tensor, nn
from torch.nn import functional as F

from repfuse.checking.comparison import level, with_fallbacks
from repfuse.checking.inputs import FAINT, KINDS, LARGE, Effort, Trial, input_variants, noise, rounded_through
from repfuse.checking.runs import enough_threads, run_float64
from repfuse.checking.verification import verify
from repfuse.errors import RepfuseError
from repfuse.networks import using_threads


def made(kind: str, *shape: int, axes: tuple[int, ...] = (2, 3), seed: int = 0) -> torch.Tensor:
    return {**KINDS, "noise": noise}[kind](shape, axes, torch.Generator().manual_seed(seed))


@torch.no_grad()
def error(one, other, x: torch.Tensor) -> float:
    return level(one(x), other(x)).max


def labels(trials) -> list[str]:
    return [trial.label.split()[0] if "size" not in trial.label else trial.label for trial in trials]


# --- what each kind finds ----------------------------------------------------------------------------------------


def test_an_impulse_shows_every_tap_of_a_kernel_in_every_phase_of_a_stride():
    kernel = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = made("impulses", 1, 3, 17, 18)
    for tap in range(4):
        wrong = kernel.clone()
        wrong.view(4, 3, 4)[..., tap] *= 1.5
        found = error(lambda x: F.conv2d(x, kernel, stride=2), lambda x, w=wrong: F.conv2d(x, w, stride=2), x)
        assert found > 0.05, tap


def test_an_impulse_stands_alone_and_there_is_one_in_every_corner():
    x = made("impulses", 1, 1, 32, 33)[0, 0].abs()
    high = (x > 5 * FAINT).nonzero().tolist()
    assert len(high) >= 12
    for one in high:
        assert all(max(abs(a - b) for a, b in zip(one, other, strict=True)) >= 10 for other in high if other != one)
    corners = [made("impulses", 1, 64, 32, 33)[0, :, i, j].abs().mean() for i in (0, -1) for j in (0, -1)]
    assert min(corners) > LARGE / 2


def test_one_wrong_tap_is_diluted_less_by_impulses_than_by_noise():
    kernel = torch.ones(1, 1, 7, 7, dtype=torch.float64)
    wrong = kernel.clone()
    wrong[0, 0, 2, 5] += 0.01
    found = {
        k: error(lambda x: F.conv2d(x, kernel), lambda x: F.conv2d(x, wrong), made(k, 1, 1, 40, 41)) for k in KINDS
    }
    assert found["impulses"] > 2 * found["large"]


def test_a_wrong_sum_of_a_kernel_shows_most_where_all_is_even():
    kernel = torch.randn(8, 8, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wrong = kernel + 1e-3  # as if a mean had not been taken off
    found = {
        kind: error(lambda x: F.conv2d(x, kernel), lambda x: F.conv2d(x, wrong), made(kind, 2, 8, 20, 21))
        for kind in ("noise", "nearly constant")
    }
    assert found["nearly constant"] > 1.5 * found["noise"]


def test_a_wrong_border_is_not_diluted_by_the_interior_of_a_frame():
    kernel = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def wrong(x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=0.01), kernel)

    found = {
        kind: level(F.conv2d(x, kernel, padding=1), wrong(x)).rms
        for kind in ("noise", "frame")
        for x in [made(kind, 1, 3, 60, 61)]
    }
    assert found["frame"] > 2 * found["noise"]


def test_large_inputs_wake_what_a_bias_keeps_silent():
    silent = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).double()
    silent[0].bias.data.copy_(torch.tensor([-8.0, 0.0, 0.0, 0.0]))
    wrong = copy.deepcopy(silent)
    wrong[0].weight.data[0] *= 1.01
    assert error(silent, wrong, made("noise", 1, 3, 20, 20)) == 0
    assert error(silent, wrong, made("large", 1, 3, 20, 20)) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axes"), [((2, 3, 9), (2,)), ((2, 9, 4), (1,)), ((1, 2, 5, 1, 7), (2, 3, 4))])
def test_kinds_of_any_number_of_axes_repeat_and_are_neither_zero_nor_constant(kind, shape, axes):
    x = made(kind, *shape, axes=axes)
    assert x.shape == shape and x.dtype == torch.float64 and bool(x.isfinite().all())
    assert torch.equal(x, made(kind, *shape, axes=axes))
    assert not torch.equal(x, made(kind, *shape, axes=axes, seed=1))
    assert len(x.unique()) > 0.9 * x.numel()


# --- which are tried ---------------------------------------------------------------------------------------------


def test_variants_cover_sizes_batches_and_kinds():
    image = torch.randn(2, 3, 32, 40)
    trials = input_variants((image,))
    shapes = {trial.inputs[0].shape for trial in trials}
    assert torch.equal(trials[0].inputs[0], image)
    assert {shape[0] for shape in shapes} == {1, 2, 3}
    assert {shape[2:] for shape in shapes} >= {(n, n) for n in (1, 2, 7)} | {(8, 11), (16, 21)}
    assert {shape[2] % 2 for shape in shapes} == {0, 1}
    assert any((trial.inputs[0][-1] == 1).all() for trial in trials)
    assert len({trial.label for trial in trials}) == len(trials)
    for kind in KINDS:
        assert any(trial.label.startswith(kind) for trial in trials), kind


@pytest.mark.parametrize(
    ("effort", "work", "measured"), [("quick", 2, 0.3), ("default", 3.2, 0.3), ("thorough", 21, 3)]
)
@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (1, 3, 64, 64), (8, 3, 64, 96), (1, 2, 32, 32, 32)])
def test_the_work_of_the_variants_is_bounded(effort, work, measured, shape):
    own = torch.Size(shape).numel()
    trials = input_variants((torch.empty(shape),), effort=effort)
    assert sum(trial.work for trial in trials) <= work * own
    assert sum(trial.work for trial in trials if trial.sampled) <= measured * own


def test_more_effort_tries_more():
    tried = [input_variants((torch.randn(1, 3, 96, 96),), effort=effort) for effort in Effort]
    assert len(tried[0]) <= len(tried[1]) < len(tried[2])
    assert sum(t.work for t in tried[0]) < sum(t.work for t in tried[1]) < sum(t.work for t in tried[2])
    assert labels(tried[0]) == ["the", "size 101x12", "size 12x101", "large", "size 2x2", "batch"]
    for trials in tried[1:]:
        assert {kind.split()[0] for kind in KINDS} <= set(labels(trials))


def test_a_thorough_check_meets_every_phase_of_a_stride_along_each_axis():
    sizes = [trial.shapes[0][2:] for trial in input_variants((torch.empty(1, 3, 128, 160),), effort="thorough")]
    for axis in (0, 1):
        row = sorted(size[axis] for size in sizes)
        assert {n % 32 for n in row} == set(range(32))


def test_an_effort_that_does_not_exist_is_bad_input():
    for call in (
        lambda: input_variants(example(), effort="huge"),
        lambda: verify(*[network(1)] * 2, example(), effort="?"),
    ):
        with pytest.raises(RepfuseError, match="no effort") as caught:
            call()
        assert "quick" in caught.value.hint


def test_variants_repeat_and_follow_the_seed():
    first, again, other = (input_variants(example(), seeds=seeds) for seeds in ((0, 1), (0, 1), (2, 3)))
    assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(first, again, strict=True))
    same = [a.label for a, b in zip(first, other, strict=True) if torch.equal(a.inputs[0], b.inputs[0])]
    assert same == ["the example"]


def test_only_floating_inputs_change_their_values_and_sizes():
    image, tokens, scale = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), torch.arange(6).reshape(1, 6), 3
    for trial in input_variants((image, tokens, scale)):
        x, y, z = trial.inputs
        assert x.dtype is torch.bfloat16 and z == 3
        assert torch.equal(y, tokens.expand(len(x), -1)), trial.label


@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 9), (1, 2, 5, 6, 7), ()])
def test_variants_of_any_number_of_axes(shape):
    for effort in Effort:
        trials = input_variants((torch.randn(shape),), effort=effort)
        assert {trial.inputs[0].dim() for trial in trials} == {len(shape)}
        assert len({trial.label for trial in trials}) == len(trials)


def test_plain_features_get_single_features_and_large_ones():
    trials = {trial.label: trial.inputs[0] for trial in input_variants((torch.randn(2, 30),))}
    assert {"large", "impulses"} <= set(trials)
    assert (trials["impulses"].abs() > 0.5).sum() <= 8


def test_inputs_in_lists_and_dicts_stay_in_them_and_change_together():
    given = ({"image": torch.randn(1, 3, 40, 40), "depth": [torch.randn(1, 1, 40, 40)]}, torch.randn(1, 4))
    for trial in input_variants(given):
        (inputs, features) = trial.inputs
        assert inputs["image"].shape[2:] == inputs["depth"][0].shape[2:]
        assert features.shape == (len(inputs["image"]), 4)


def test_inputs_are_rounded_to_what_both_dtypes_hold_also_those_in_reserve():
    (x,) = rounded_through(Trial("", (torch.tensor([1 / 3]),)), torch.bfloat16).inputs
    assert x.dtype is torch.float32 and torch.equal(x, x.bfloat16().float())
    for trial in input_variants((torch.randn(1, 3, 96, 96),)):
        for other in rounded_through(trial, torch.bfloat16).otherwise():
            assert torch.equal(other.inputs[0], other.inputs[0].bfloat16().float())


# --- networks that do not take every size ------------------------------------------------------------------------


class Fixed(nn.Module):
    """A vision transformer's way: an embedding per position."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 4, size, size))

    def forward(self, x):
        return self.conv(x) + self.position


class Halving(nn.Module):
    """A U-Net's way: only multiples of 32 come out as large as they went in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        down = F.max_pool2d(self.conv(x), 32)
        return x + F.interpolate(down, scale_factor=32)


class Tokens(nn.Sequential):
    """A transformer's way: channels come last, and any number of tokens."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(48), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 8))


class Last(nn.Module):
    """Channels come last, also of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize(
    ("make", "given", "sizes"),
    [
        (lambda: Fixed(40), (1, 3, 40, 40), {(3, 40, 40)}),
        (Halving, (1, 3, 96, 96), {(3, 64, 32)}),
        (Tokens, (1, 40, 48), {(32, 48)}),
        (Last, (1, 40, 44, 5), {(20, 23, 5)}),
    ],
)
def test_a_network_that_takes_few_sizes_sees_every_kind_all_the_same(make, given, sizes):
    original = make()
    trials, outcomes = with_fallbacks(original, input_variants((torch.randn(given),)))
    taken = [trial for trial, outcome in zip(trials, outcomes, strict=True) if not outcome.error]
    kinds = {name: [t for t in taken if t.label.startswith(name)] for name in (*KINDS, "batch 2")}
    assert all(kinds.values()), {name: len(found) for name, found in kinds.items()}
    assert {tuple(trial.inputs[0].shape[1:]) for found in kinds.values() for trial in found} == sizes
    again = run_float64(original, taken)
    for outcome, other in zip((o for o in outcomes if not o.error), again, strict=True):
        assert torch.equal(outcome.outputs["out"], other.outputs["out"])


def test_a_mistake_that_one_kind_shows_is_found_in_a_network_of_one_size():
    original = nn.Sequential(Fixed(20), nn.Threshold(12.0, 0.0))
    wrong = copy.deepcopy(original)
    wrong[0].conv.weight.data[0] *= 1.01
    assert verify(original, wrong, (torch.zeros(1, 3, 20, 20),)).verdict == "different"


def test_what_no_other_size_suits_stays_as_refused():
    def refuse(x):
        raise ValueError("never")

    class Picky(nn.Module):
        def forward(self, x):
            return x if x.shape == (1, 3, 9, 9) and x.flatten()[0] == 1 else refuse(x)

    trials, outcomes = with_fallbacks(Picky(), input_variants((torch.ones(1, 3, 9, 9),)))
    assert [trial.label for trial, outcome in zip(trials, outcomes, strict=True) if not outcome.error] == [
        "the example"
    ]
    assert [trial.label for trial in trials] == [t.label for t in input_variants((torch.ones(1, 3, 9, 9),))]


def test_every_effort_calls_a_correct_fusion_the_same():
    original = network(2)
    for effort in Effort:
        verification = verify(original, folded(original), example(size=12), effort=effort)
        assert (verification.verdict, verification.effort) == ("same", effort.value)
    assert "quick" not in "".join(verification.notes).lower()
    assert any("--quick" in note for note in verify(original, original, example(), effort="quick").notes)


# --- with how many threads ----------------------------------------------------------------------------------------


class Waiting(nn.Module):
    """Moves the clock on by what its table says for the number of threads that torch may use."""

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        CLOCK[0] += self.seconds[torch.get_num_threads()]
        return x + 1


CLOCK = [0.0]


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [({1: 0.02, 2: 0.4}, 1), ({1: 0.4, 2: 0.02}, 2), ({1: 0.1, 2: 0.1}, 1)],
    ids=["they wait for each other", "they share the work", "they change nothing"],
)
def test_threads_are_used_where_they_make_the_network_faster(
    seconds: dict[int, float], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: CLOCK[0])
    with using_threads(2):
        assert enough_threads(Waiting(seconds), (torch.ones(1),)) == wanted
        assert torch.get_num_threads() == 2
        monkeypatch.setattr("repfuse.memory.LARGE", 0)
        monkeypatch.setattr("repfuse.checking.runs.multiply", lambda: Waiting(seconds)(torch.ones(1)))
        assert enough_threads(Waiting({}), (torch.ones(1),)) == wanted


def test_one_thread_is_enough_without_trying() -> None:
    with using_threads(1):
        assert enough_threads(Waiting({}), (torch.ones(1),)) == 1
