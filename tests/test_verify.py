"""The verdict: what must pass, what must not, and when nothing can be told."""

from __future__ import annotations

import copy
import io
import json
from itertools import product

import pytest
import torch
from blocks import Spelled
from support.folded import DTYPES, example, folded, network
from torch import nn

from repfuse.checking.verification import verify
from repfuse.errors import RepfuseError


def in_pairs(*axes):
    """Every second combination, so that each value meets others of each axis; all of them in the slow suite."""
    rows = [zip(*each, strict=True) for each in product(*(enumerate(axis) for axis in axes))]
    return [
        pytest.param(*values, marks=pytest.mark.slow if sum(places) % 2 else ()) for places, values in map(tuple, rows)
    ]


@pytest.mark.parametrize(("dtype", "wide", "depth"), in_pairs(DTYPES, (True, False), (1, 4, 20)))
def test_a_correct_fusion_is_the_same(dtype, wide, depth):
    """Folded in float64 or in its own dtype."""
    original = network(depth, dtype=dtype)
    verification = verify(original, folded(original, wide=wide), example(dtype))
    assert verification.verdict == "same", verification.reason


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_the_number_of_outputs_does_not_matter(classes):
    original = network(3, classes=classes, dtype=torch.bfloat16)
    assert verify(original, folded(original), example(torch.bfloat16)).verdict == "same"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_is_the_same_as_itself_and_as_a_serialised_copy(dtype):
    original = network(dtype=dtype)
    buffer = io.BytesIO()
    torch.save(original, buffer)
    buffer.seek(0)
    for other in (original, torch.load(buffer, weights_only=False)):
        verification = verify(original, other, example(dtype))
        assert verification.verdict == "same"
        assert all(output.error.max_abs == 0 for output in verification.outputs)


def test_both_run_in_eval_mode():
    original = network(2)
    fused = folded(original)
    assert verify(original.train(), fused, example()).verdict == "same"
    assert original.training


def test_the_result_does_not_depend_on_the_state_of_random_numbers():
    noisy = Returns(lambda y: y + torch.randn(y.shape))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(verify(noisy, copy.deepcopy(noisy), example()).to_dict())
    assert results[0] == results[1]


def test_a_traced_network_is_the_same():
    original = network(2)
    assert verify(original, torch.fx.symbolic_trace(folded(original)), example()).verdict == "same"


def test_a_torchscript_network_is_judged():
    original = network(2)
    script = torch.jit.trace(original, example())
    other = torch.jit.trace(network(2, seed=1), example())
    assert verify(original, script, example()).verdict == verify(script, script, example()).verdict == "same"
    assert verify(original, other, example()).verdict == "different"
    frozen = torch.jit.freeze(torch.jit.script(original))
    found = verify(original, frozen, example())  # its numbers stay in float32
    assert found.verdict == "same" and any("no float64" in note for note in found.notes)
    wrong = torch.jit.freeze(torch.jit.script(network(2, seed=1)))
    assert verify(original, wrong, example()).verdict == "different"


def test_a_network_that_was_built_for_inference_alone_is_judged():
    with torch.inference_mode():
        original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert verify(original, original, example()).verdict == "same"


def _weight(fused: nn.Module, step: float) -> None:
    weight = fused[0][3].weight
    weight[2, 1, 0, 0] += step * weight.abs().max()


def _bias(fused: nn.Module, step: float) -> None:
    bias = fused[0][3].bias
    bias[3] += step * bias.abs().max()


def _swap(fused: nn.Module, _step: float) -> None:
    weight = fused[0][6].weight
    weight[[0, 1]] = weight[[1, 0]].clone()


def _border(fused: nn.Module, _step: float) -> None:
    fused[0][3].padding_mode = "replicate"
    fused[0][3]._reversed_padding_repeated_twice = [1, 1, 1, 1]


# One number moved by this part of the largest in its tensor.
STEPS = {torch.float64: 1e-6, torch.float32: 0.01, torch.float16: 0.5, torch.bfloat16: 3.0}


@pytest.mark.parametrize(("dtype", "harm"), in_pairs(DTYPES, [_weight, _bias, _swap, _border]))
def test_one_wrong_number_is_different(dtype, harm):
    original = network(dtype=dtype)
    fused = folded(original)
    with torch.no_grad():
        harm(fused, STEPS[dtype])
    verification = verify(original, fused, example(dtype))
    assert (verification.verdict, verification.exit_code) == ("different", 1)
    assert verification.reason.startswith("In float64")


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_wrong_eps_is_different(dtype):
    original = network(dtype=dtype)
    fused = folded(original, eps=1e-2)  # for 1e-5, with variances between 0.5 and 1.5
    assert verify(original, fused, example(dtype)).verdict == "different"


def test_a_mistake_in_a_unit_that_usual_inputs_leave_silent():
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with torch.no_grad():
        original[0].weight.normal_(generator=torch.Generator().manual_seed(0))
        original[0].bias.copy_(torch.tensor([-12.0, 0.0, 0.0, 0.0]))
        wrong = copy.deepcopy(original)
        wrong[0].weight[0] *= 1.01
    assert verify(original, wrong, example()).verdict == "different"


def test_a_border_mistake_shows_where_the_example_hides_it():
    original = network(2, classes=0)
    fused = folded(original)
    fused[0][3].padding, fused[0][3].padding_mode = 0, "zeros"
    fused[0].insert(3, nn.ConstantPad2d(1, 1e-3))
    verification = verify(original, fused, example(size=64))
    assert verification.verdict == "different"
    worst = verification.outputs[0].error.worst
    assert {0, verification.outputs[0].error.shape[2] - 1} & set(worst[2:])


def test_where_they_first_differ():
    original = network(6)
    fused = folded(original)
    with torch.no_grad():
        _weight(fused, 0.1)
    found = verify(original, fused, example()).first_difference
    assert found is not None
    assert (found.path, found.after) == ("0.3", "0.2")  # not 0.0, whose normalisation moved into it rightly
    assert found.error.exceeds(found.allowed)


def test_a_network_that_only_one_input_size_suits():
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 49, 5))
    verification = verify(original, copy.deepcopy(original), example())
    assert verification.verdict == "same"
    refused = [trial for trial in verification.trials if trial.skipped]
    assert {trial.label for trial in refused} >= {"size 2x2", "size 2x3"}
    assert all("Error" in trial.skipped for trial in refused)


class OneSize(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        if x.shape[-1] != 9:
            raise ValueError("only 9 pixels")
        return self.network(x)


def test_an_input_that_only_the_fused_network_refuses_is_a_difference():
    original = network(2)
    verification = verify(original, OneSize(original), example())
    assert verification.verdict == "different"
    assert "only 9 pixels" in verification.reason


def test_an_input_that_only_the_original_refuses_is_left_out():
    original = network(2)
    assert verify(OneSize(original), original, example()).verdict == "same"


class Returns(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 1)
        nn.init.ones_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda y: y, lambda y: (y, y), "returns out, the fused network out[0], out[1]"),
        (lambda y: y, lambda y: y.flatten(1), "out is 1x4x9x9 in the original and 1x324"),
        (lambda y: y > 0, lambda y: y, "out is torch.bool"),
        (lambda y: {"a": y}, lambda y: {"b": y}, "out.a"),
        (lambda y: y, lambda y: y.log(), "not a number"),
    ],
)
def test_another_form_of_output_is_different(first, second, said):
    verification = verify(Returns(first), Returns(second), example())
    assert verification.verdict == "different"
    assert said in verification.reason


def test_a_nan_in_the_same_places_is_the_same_and_said():
    verification = verify(Returns(torch.log), Returns(torch.log), example())
    assert verification.verdict == "same"
    assert any("not a number" in note for note in verification.notes)


@pytest.mark.parametrize("function", [lambda y: y * float("nan"), lambda y: y * 0, lambda y: y[:0]])
def test_outputs_without_a_number_tell_nothing(function):
    verification = verify(Returns(function), Returns(function), example())
    assert (verification.verdict, verification.exit_code) == ("could-not-tell", 2)


def test_a_network_that_does_not_repeat_itself_tells_nothing():
    import random

    verification = verify(*(Returns(lambda y: y * random.random()) for _ in range(2)), example())
    assert verification.verdict == "could-not-tell"
    assert "repeat" in verification.reason


def test_torch_random_numbers_are_the_same_for_both():
    noisy = Returns(lambda y: y + torch.randn(y.shape))
    state = torch.random.get_rng_state()
    assert verify(noisy, copy.deepcopy(noisy), example()).verdict == "same"
    assert torch.equal(state, torch.random.get_rng_state())


class FixesFloat32(nn.Module):
    def forward(self, x):
        if x.dtype is not torch.float32:
            raise TypeError("float32 only")
        return nn.functional.conv2d(x, torch.ones(2, 3, 1, 1))


def test_a_network_that_fixes_its_dtype_is_judged():
    assert verify(FixesFloat32(), network(1), example()).verdict == "different"
    assert verify(Returns(lambda y: y[:, :2]), FixesFloat32(), example()).verdict == "same"


def test_a_network_too_sensitive_to_tell():
    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.9))

        def forward(self, x):
            y = x.sigmoid()
            for _ in range(60):
                y = self.weight * y * (1 - y)
            return y

    other = Chaotic()
    other.weight.data += 1e-6
    assert verify(Chaotic(), other, example()).verdict == "could-not-tell"


def test_one_output_that_tells_nothing_is_not_the_same_for_the_others_sake():
    def outputs(m, x):
        return m.a(x), torch.sin(1e9 * m.b(x))

    network = Spelled(outputs, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)).eval()
    other = copy.deepcopy(network)
    other.a.weight.data += 1e-9
    other.b.weight.data *= -1
    found = verify(network, other, example())
    assert found.verdict == "could-not-tell" and "out[1]" in found.reason
    assert verify(network, network, example()).verdict == "same"


def test_another_dtype_is_said_and_judged_by_its_rounding():
    original = network()
    verification = verify(original, copy.deepcopy(original).to(torch.bfloat16), example())
    assert verification.verdict == "same", verification.reason
    assert verification.dtypes == ("float32", "bfloat16")
    assert any("bfloat16" in note for note in verification.notes)
    assert verification.outputs[0].error.relative.max > 1e-4


def test_rounding_the_inputs_is_no_error_of_the_network():
    class Differences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return (x[..., 1:] - x[..., :-1]) * self.scale

    images = example()[0] + 100  # in bfloat16 as coarse as the differences themselves
    assert verify(Differences(), Differences().to(torch.bfloat16), (images,)).verdict == "same"


def test_the_networks_handed_in_stay_as_they_are():
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x

    original = nn.Sequential(network(), Counts()).train()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    threads = torch.get_num_threads()
    verify(original, original, example())
    assert original.training and original[0].training and original[1].calls == 0
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert torch.get_num_threads() == threads


def test_a_wrong_example_is_bad_input():
    with pytest.raises(RepfuseError, match="cannot run") as caught:
        verify(network(), network(), (torch.randn(1, 5, 9, 9),))
    assert caught.value.exit_code == 2 and caught.value.hint


def test_a_network_that_cannot_be_copied_is_bad_input():
    broken = network(1)
    broken.file = io.BufferedReader(io.BytesIO())
    with pytest.raises(RepfuseError, match="cannot be copied"):
        verify(broken, network(1), example())


def test_the_result_is_json_and_repeats():
    original = network(2)
    fused = folded(original)
    first, second = (verify(original, fused, example()).to_dict() for _ in range(2))
    assert json.dumps(first, allow_nan=False) == json.dumps(second)
    different = verify(original, Returns(lambda y: y * float("inf")), example())
    json.dumps(different.to_dict(), allow_nan=False)


def test_progress_ends_at_one():
    seen: list[float] = []
    verify(network(1), network(1), example(), progress=lambda _stage, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_the_same_is_tried_around_every_further_example():
    original, other = network(1), (torch.randn(2, 3, 5, 6),)
    found = verify(original, original, example(), further_examples=[other], seeds=(3, 4)).trials
    alone = verify(original, original, other, seeds=(3, 4)).trials
    assert [row.shapes for row in found[-len(alone) :]] == [row.shapes for row in alone]
    assert [row.label for row in found[-len(alone) :]] == [f"{row.label} around 2x3x5x6" for row in alone]
    with pytest.raises(RepfuseError, match="does not take the input 1x7x5x5"):
        verify(original, original, example(), further_examples=[(torch.randn(1, 7, 5, 5),)])
