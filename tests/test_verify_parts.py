"""What the verdict is made of: inputs, outputs, measures, rounding, comparison, drift."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from blocks import Spelled
from hypothesis import given
from hypothesis import strategies as st
from support.folded import DTYPES, example, folded, network
from support.proving import compare
from torch import nn

from repfuse.checking.agreement import agreement
from repfuse.checking.comparison import level, mismatch, output_error, reference
from repfuse.checking.drift import check_written, drift
from repfuse.checking.inputs import Trial, input_variants
from repfuse.checking.places import compare_exact
from repfuse.checking.results import Comparison, Level
from repfuse.checking.rounding import (
    RoundingEffects,
    allowed,
    half_spacing,
    on,
    rounded_once,
    rounding,
    unchanged,
)
from repfuse.checking.runs import Outcome, copied, in_float64, leaves, run, run_float64
from repfuse.checking.verification import verify
from repfuse.errors import RepfuseError
from repfuse.networks import named_tensors

finite = st.floats(-1e6, 1e6, allow_subnormal=False)
vectors = st.lists(finite, min_size=1, max_size=20).map(lambda values: torch.tensor(values, dtype=torch.float64))


# --- outputs -----------------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


def test_leaves_have_readable_names():
    one = torch.ones(1)
    Pair = namedtuple("Pair", "left right")
    value = OrderedDict(a=one, b=[one, (one,)], c=Output(one, ()), d=Pair(one, None), e=2.0)
    value["f g"] = one
    names = ["out.a", "out.b[0]", "out.b[1][0]", "out.c.logits", "out.d.left", "out.e", "out['f g']"]
    assert list(leaves(value)) == names


def test_a_field_that_was_never_set_is_none():
    @dataclass
    class Partly:
        logits: torch.Tensor
        hidden: torch.Tensor = field(init=False)

    assert list(leaves(Partly(torch.ones(1)))) == ["out.logits"]


def test_complex_outputs_are_pairs_of_real_ones():
    assert leaves(torch.tensor([1 + 2j]))["out"].tolist() == [[1, 2]]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_outputs_have_all_their_numbers(sparse):
    assert leaves(sparse(torch.tensor([[0.0, 2.0]])))["out"].tolist() == [[0, 2]]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_walked():
    network = Spelled(lambda _, x: torch.nested.nested_tensor([x[0, 0], x[0, 1, :2]]))
    assert leaves(network(example()[0]))["out[1]"].shape == (2, 9)
    assert verify(network, network, example()).verdict == "same"


def test_a_weight_in_float8_is_widened_as_any_other():
    network = Spelled(lambda m, x: x * m.weight.to(x.dtype))
    network.register_buffer("weight", torch.tensor([1.5]).to(torch.float8_e4m3fn))
    other = copy.deepcopy(network)
    other.weight = torch.tensor([2.5]).to(torch.float8_e4m3fn)
    assert verify(network, copy.deepcopy(network), example()).verdict == "same"
    assert verify(network, other, example()).verdict == "different"


def test_an_output_that_is_no_number_is_refused():
    with pytest.raises(RepfuseError, match=r"out\[1\]"):
        leaves((torch.ones(1), "text"))


# --- measures ----------------------------------------------------------------------------------------------------


@given(vectors)
def test_equal_tensors_have_no_error(a):
    assert level(a, a.clone()) == level(a * 0, a * 0)
    assert level(a, a).max == 0


@given(vectors, st.floats(1e-3, 1e3))
def test_the_relative_error_does_not_depend_on_the_scale(a, factor):
    b = a + torch.linspace(-1, 1, len(a), dtype=torch.float64)
    if a.abs().max() < 1:
        return
    first, second = level(a, b), level(a * factor, b * factor)
    assert first.rms == pytest.approx(second.rms) and first.max == pytest.approx(second.max)


@given(vectors, vectors)
def test_the_smallest_tolerances_pass_and_smaller_ones_do_not(a, b):
    b = torch.resize_as_(b.clone(), a) if len(b) >= len(a) else torch.cat([b, a[len(b) :]])
    error = output_error("out", a, b)
    assert torch.allclose(b, a, rtol=0, atol=error.max_abs * (1 + 1e-12))
    if error.max_abs:
        assert not torch.allclose(b, a, rtol=0, atol=error.max_abs * 0.999)
    if error.smallest_rtol is None:
        assert not torch.allclose(b, a, rtol=1e300, atol=0)
    else:
        assert torch.allclose(b, a, rtol=error.smallest_rtol * (1 + 1e-12), atol=0)


def test_what_differs_from_nothing_but_zeros_differs_infinitely():
    zeros = torch.zeros(3)
    found = level(zeros, zeros + 1e-30)
    assert found.rms == found.max == math.inf


@pytest.mark.parametrize("level", [Level(1, 3), Level(3, 1)])
def test_either_norm_alone_is_above_what_is_allowed(level):
    assert level.exceeds(Level(2, 2)) and level.over(Level(2, 2)) == 1.5
    assert not level.exceeds(Level(3, 3)) and level.over(Level(3, 3)) == 1


def test_the_numbers_of_an_output():
    a = torch.arange(1, 101, dtype=torch.float64).reshape(10, 10)
    b = a.clone()
    b[4, 7] += 5
    b[0] += 1
    error = output_error("out", a, b)
    assert error.worst == (4, 7) and error.values == (48, 53)
    assert error.max_abs == 5 and error.scale == 100 and error.relative.max == 0.05
    assert error.relative.rms == pytest.approx(math.sqrt(35) / float(torch.linalg.vector_norm(a)))
    assert error.smallest_rtol == 1


def test_elements_that_are_not_finite():
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([1.0, nan, inf, -inf])
    assert mismatch({"out": a}, {"out": a.clone()}) == ""
    error = output_error("out", a, torch.tensor([1.5, nan, inf, -inf]))
    assert (error.non_finite, error.max_abs, error.relative.max) == (3, 0.5, 0.5)
    for other in ([1.0, nan, inf, inf], [1.0, inf, nan, -inf], [nan, nan, inf, -inf], [1.0, 2.0, inf, -inf]):
        assert "not a number" in mismatch({"out": a}, {"out": torch.tensor(other)})
        assert level(a, torch.tensor(other)).max == inf


# --- copies and rounding -----------------------------------------------------------------------------------------


def test_a_float64_copy_holds_the_same_numbers_and_shares_nothing():
    original = network(dtype=torch.float16)
    original[0][4].weight = original[0][1].weight  # shared
    original.register_buffer("phase", torch.tensor([1j]))
    original.plain = (torch.ones(2, requires_grad=True) * 3).half()  # no leaf, no buffer
    with copied(original, in_float64) as twin:
        for (name, a), (_, b) in zip(named_tensors(original), named_tensors(twin), strict=True):
            if a.is_floating_point():
                assert b.dtype is torch.float64 and torch.equal(a.double(), b), name
            else:
                assert a.dtype is b.dtype and torch.equal(a, b), name
        assert twin[0][4].weight is twin[0][1].weight
        assert len({id(tensor) for _, tensor in named_tensors(twin)}) == len(list(named_tensors(twin)))
    wide = network(dtype=torch.float64)
    with copied(wide, in_float64) as twin:
        assert twin[0][0].weight.data_ptr() != wide[0][0].weight.data_ptr()


@pytest.mark.parametrize("recorded", [False, True])
def test_the_tensors_of_a_copy_are_gone_after_its_use_and_those_of_the_network_stay(recorded: bool):
    original = torch.fx.symbolic_trace(network()) if recorded else network()
    before = {name: x.clone() for name, x in named_tensors(original)}
    gc.disable()  # a recorded network refers to itself
    try:
        with copied(original, in_float64) as twin:
            held = [weakref.ref(x) for _, x in named_tensors(twin)]
            assert all(each() is not None for each in held)
        assert all(each() is None for each in held)
    finally:
        gc.enable()
    assert all(torch.equal(x, before[name]) for name, x in named_tensors(original)) and before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(st.floats(-1e4, 1e4), st.floats(-1, 1))
def test_half_a_spacing_is_the_largest_error_of_rounding(dtype, value, part):
    stored = torch.tensor(value).to(dtype)
    half = half_spacing(stored)
    moved = stored.double() + part * 0.499 * half
    assert moved.to(dtype) == stored  # at a power of two the spacing below is half that above
    assert (stored.double() + half * 2).to(dtype) != stored


def test_rounding_once_moves_what_changed_and_nothing_else():
    original = network()
    fused = folded(original)
    exact = unchanged(fused, original)
    assert exact == {"3.weight", "3.bias"}
    with copied(fused, rounded_once(0, exact)) as twin:
        moved = dict(named_tensors(twin))
    for name, tensor in named_tensors(fused):
        assert torch.equal(moved[name], tensor.double()) == (name in exact), name
        assert (moved[name].float() - tensor).abs().max() <= half_spacing(tensor).max() * 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_measured_effect_is_that_of_uniform_errors_within_half_a_spacing(dtype):
    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((4096,), 1.5, dtype=dtype))

        def forward(self, x):
            return x * self.weight

    trials = [Trial("", (torch.ones(1, dtype=dtype),))]
    found = rounding(Identity(), on(trials), run_float64(Identity(), trials), frozenset())[0, "out"]
    half = torch.finfo(dtype).eps / 2  # at numbers between 1 and 2
    assert found.rms == pytest.approx(half / math.sqrt(3) / 1.5, rel=0.03)
    assert found.max == pytest.approx(half / 1.5, rel=0.01)


def test_an_output_whose_form_hangs_on_a_rounding_is_known_to_no_accuracy():
    class Above(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(1, 2, 50))

        def forward(self, x):
            return self.weight[self.weight > 1.5 * x]

    trials = [Trial("", (Above().weight.detach()[20] / 1.5,))]
    outcomes = run_float64(Above(), trials)
    assert math.isinf(rounding(Above(), on(trials), outcomes, frozenset())[0, "out"].rms)


def test_effects_add_as_squares_and_a_lucky_trial_borrows_the_median():
    """Six times what they add up to is allowed: `repfuse explain drift`."""
    levels = [Level(3e-6, 3e-4), Level(0.0, 0.0), Level(3e-6, 3e-4)]
    other = [Level(4e-6, 4e-4), Level(0.0, 0.0), Level(4e-6, 4e-4)]
    found = allowed([{(i, "out"): x for i, x in enumerate(part)} for part in (levels, other)])
    for limit in found.values():
        assert (limit.rms, limit.max) == pytest.approx((6 * 5e-6, 6 * 5e-4))


# --- comparison --------------------------------------------------------------------------------------------------


def test_compare_passes_a_fusion_in_float64_and_fails_one_that_was_rounded():
    original = network()
    trials = input_variants(example())
    assert compare(original, folded(network().double()), trials).passed
    rounded = compare(original, folded(original), trials)
    assert not rounded.passed and 1e-9 < rounded.error < 1e-5
    assert compare(original, folded(original), trials, tolerance=1e-5).passed


def test_compare_says_what_was_skipped_and_where_it_was_worst():
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    wrong = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    result = compare(original, wrong, input_variants(example(torch.float64)))
    assert {trial.label for trial in result.skipped} == {"size 1x1", "size 2x2", "size 2x3", "size 1x14", "size 14x1"}
    assert not result.passed and "above 1.0e-12" in result.reason
    assert result.to_dict()["passed"] is False


def test_one_mismatch_fails_a_comparison_whose_numbers_agree():
    class OnlySmall(nn.Module):
        def forward(self, x):
            if x.shape[-1] > 8:
                raise ValueError("too large")
            return x

    trials = [Trial("small", example(size=5)), Trial("large", example(size=9))]
    result = compare(nn.Identity(), OnlySmall(), trials)
    assert result.error == 0 and not result.passed
    assert result.reason.startswith("large: the original runs") and "too large" in result.reason
    assert compare(OnlySmall(), nn.Identity(), trials).passed  # what only the original refuses is skipped


def test_a_comparison_of_nothing_does_not_pass():
    assert not Comparison((), 1e-12).passed


def test_compare_without_a_usable_example_is_bad_input():
    with pytest.raises(RepfuseError, match="1x4x4"):
        compare(network(), network(), [Trial("the example", (torch.randn(1, 4, 4),))])


# --- drift -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_drift_of_a_correct_fusion_is_allowed(dtype):
    original = network(4, dtype=dtype)
    found = drift(original, folded(original), input_variants(example(dtype)))
    assert found.passed and found.worst.dtype == str(dtype).removeprefix("torch.")
    if dtype is not torch.float64:
        eps = torch.finfo(dtype).eps
        assert eps / 100 < found.worst.fused.rms < found.worst.allowed.rms < 30 * eps


class AsStored(nn.Module):
    """A network with another last step, but not in float64."""

    def __init__(self, inner, step):
        super().__init__()
        self.inner, self.step = inner, step

    def forward(self, x):
        y = self.inner(x)
        return y if y.dtype is torch.float64 else self.step(y)


def lower(y):
    return y.to(torch.bfloat16).to(y.dtype)


def fail(y):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize("step", [lower, fail, torch.Tensor.double, torch.Tensor.flatten])
def test_what_only_shows_as_stored_is_different(step):
    original = network(4, classes=0)
    fused = AsStored(folded(original), step)
    assert not drift(original, fused, input_variants(example())).passed
    verification = verify(original, fused, example())
    assert verification.verdict == "different"
    assert verification.reason.startswith(("In float32", "As stored"))


class Known(RoundingEffects):
    """What rounding explains: ``borrowed`` at first, ``there`` where it was measured."""

    def __init__(self, borrowed, there=None):
        self.borrowed, self.there, self.measured = borrowed, there, set()

    def measure_usual(self):
        self.measured.add(0)

    def cheapest(self, positions):
        return min(positions)

    def measure(self, positions):
        self.measured |= set(positions)

    def levels(self, keys):
        return {key: self.there if self.there and key[0] in self.measured else self.borrowed for key in keys}


def test_what_rounding_the_weights_explains_is_allowed():
    original, trials = network(2), input_variants(example())
    fused, exact = AsStored(original, lower), reference(original, trials)
    assert drift(original, fused, trials, exact, effect=Known(Level(1e-2, 1e-2))).passed
    assert not drift(original, fused, trials, exact, effect=Known(Level(1e-6, 1e-6))).passed


def test_a_drift_above_a_borrowed_effect_is_judged_by_its_own():
    original, trials = network(2), input_variants(example())
    fused, exact = AsStored(original, lower), reference(original, trials)
    low, high = Level(1e-6, 1e-6), Level(1e-2, 1e-2)
    assert drift(original, fused, trials, exact, effect=Known(low, there=high)).passed
    assert not drift(original, fused, trials, exact, effect=Known(low, there=low)).passed


def test_what_rounding_explains_is_not_measured_where_the_originals_own_error_is_as_large():
    original, trials = network(2), input_variants(example())
    never = Known(Level(1e-2, 1e-2))
    found = drift(original, folded(original), trials, effect=never)
    assert found.passed and not never.measured
    assert {row.rounding for row in found.outputs} == {None}
    needed = drift(original, AsStored(original, lower), trials, effect=Known(Level(1e-2, 1e-2)))
    assert needed.passed and {row.rounding for row in needed.outputs} == {Level(1e-2, 1e-2)}


class LuckyFirst(nn.Module):
    """Rounds its output to bfloat16, but neither in float64 nor where the input is just the example."""

    def __init__(self, inner, x):
        super().__init__()
        self.inner, self.x = inner, x

    def forward(self, x):
        y = self.inner(x)
        return y if y.dtype is torch.float64 or torch.equal(x, self.x) else lower(y)


def test_a_drift_above_one_lucky_draw_of_the_originals_error_is_judged_by_several():
    inner, (x,) = network(2), example()
    trials, fused = [Trial("the example", (x,))], AsStored(inner, lower)
    found = drift(LuckyFirst(inner, x), fused, trials)
    assert found.passed and found.worst.own.rms > 1e-4
    assert not drift(inner, fused, trials).passed


def test_the_last_bit_of_the_output_is_allowed_where_the_original_is_exact():
    exact, rounded = AsStored(nn.Identity(), torch.clone), AsStored(nn.Identity(), lambda y: y * (1 + 2**-23))
    found = drift(exact, rounded, input_variants(example()))
    assert found.passed and found.worst.own.max == 0 < found.worst.fused.max


def test_drift_takes_the_outcomes_that_are_known():
    original, trials = network(2), input_variants(example())
    fused = folded(original)
    assert drift(original, fused, trials, reference(original, trials)) == drift(original, fused, trials)


class OfOneSize(nn.Module):
    """Stands for a file of a free batch."""

    def forward(self, x):
        if x.shape[2:] != (9, 10):
            raise ValueError("another size")
        return x


def written_to_a_file(wrong_at, damage):
    """What is found of a file that takes all sizes, though it says one, and that is wrong on some inputs."""
    network = nn.Conv2d(4, 4, 3, padding=1).eval()

    def run_file(trials):
        outcomes = run(network, trials, {})
        for trial, outcome in zip(trials, outcomes, strict=True):
            if outcome.outputs and wrong_at(trial.inputs[0]):
                damage(outcome.outputs["out"])
        return "some runtime", outcomes

    return check_written(network, network, (torch.rand(4, 4, 9, 10),), run_file, gate=OfOneSize())


def test_a_file_is_held_to_what_its_shapes_allow():
    with pytest.raises(RepfuseError, match="does not compute what the original does"):
        written_to_a_file(lambda x: x.shape[2:] == (9, 10) and len(x) != 4, lambda y: y.mul_(0.5))


@pytest.mark.parametrize("damage", [lambda y: y.mul_(0.5), lambda y: y.fill_(torch.nan), lambda y: y.resize_(0)])
def test_what_its_shapes_exclude_counts_where_it_agrees_alone(damage):
    all_right = written_to_a_file(lambda x: False, None)
    assert "batch 5" in all_right.compared and "size 2x2" in all_right.compared and not all_right.refused
    found = written_to_a_file(lambda x: x.shape[2:] != (9, 10), damage)
    assert "batch 5" in found.compared and "size 2x2" in found.refused and len(found.refused) > 5


class Ties(nn.Module):
    """Takes some numbers where two layers of the same weights agree, which hangs on a rounding."""

    def __init__(self, factor):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, channels, 1) for channels in (1, 1, 4))
        self.b.load_state_dict(self.a.state_dict())
        self.factor = factor

    def forward(self, x):
        return self.factor * self.c(x).flatten(2)[:, :, (self.a(x) == self.b(x)).flatten()]


def test_an_output_whose_form_hangs_on_a_rounding_explains_no_error():
    right, wrong = Ties(1), Ties(1.5)
    wrong.load_state_dict(right.state_dict())
    trials = [Trial("the example", (torch.rand(1, 4, 8, 8),))]
    expected = reference(right, trials)
    assert compare_exact(right, in_float64, trials, expected).passed
    assert not compare_exact(wrong, in_float64, trials, expected).passed


class Scaled(nn.Module):
    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x * self.factor) / self.factor


def test_overflow_in_the_fused_network_alone_is_not_allowed():
    original = network(2, dtype=torch.float16)
    found = drift(original, Scaled(original, 1e30), input_variants(example(torch.float16)))
    assert not found.passed and "out is infinite or not a number in other places" in found.problem


def test_inputs_near_those_of_a_trial_that_overflow_excuse_nothing():
    layer = nn.Linear(64, 64, dtype=torch.float16)
    x = torch.rand(4, 64, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.abs_()
        layer.weight.mul_(65504 / layer(x).max())
        while layer(x).isinf().any():
            layer.weight.mul_(0.9995)
    wrong = [Outcome({"out": layer(x).roll(7, 1) / 2})]
    assert not drift(layer, layer, [Trial("the example", (x,))], found=wrong).passed


def test_overflow_in_the_original_leaves_the_drift_unmeasured():
    original = Scaled(network(2, dtype=torch.float16), 1e30)
    found = drift(original, original, input_variants(example(torch.float16)))
    assert not found.measured and "overflow" in found.problem and not found.passed


# --- real data ---------------------------------------------------------------------------------------------------


def test_agreement_and_accuracy_over_all_samples():
    original = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        original[1].weight.copy_(torch.eye(3, 4))
        other[1].weight.copy_(torch.eye(3, 4)[[0, 2, 1]])
    data = torch.eye(4)[torch.arange(150) % 3].reshape(150, 1, 2, 2)
    labels = torch.arange(150) % 3
    for form in (data, [data[:70], data[70:]], [(data[:1],), (data[1:],)]):
        real = agreement(original, other, form, labels)
        assert (real.samples, real.accuracy_original) == (150, 1.0)
        assert real.top1_agreement == real.accuracy_fused == pytest.approx(1 / 3)
    assert agreement(original, other, data, None).accuracy_original is None


def test_only_as_many_samples_are_compared_as_can_be_afforded(monkeypatch):
    monkeypatch.setattr("repfuse.checking.agreement.COMPARED", 3 * 9 * 9 * 5)
    data = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    verification = verify(network(1), network(1), example(), data=data, labels=torch.zeros(8).long())
    assert (verification.data.samples, verification.data.compared, verification.data.top1_agreement) == (8, 5, 1.0)
    assert any("first 5 of 8" in note for note in verification.notes)
    assert verification.trials[-1].shapes == ((5, 3, 9, 9),)


@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.long), torch.zeros(5), torch.zeros(5, 1).long()])
def test_labels_that_do_not_fit_are_bad_input(labels):
    with pytest.raises(RepfuseError, match="labels"):
        agreement(network(), network(), torch.randn(5, 3, 9, 9), labels)


def test_labels_for_a_network_that_is_no_classifier_are_bad_input():
    dense = network(classes=0)
    single = network(classes=1)
    for other in (dense, single):
        assert agreement(other, other, torch.randn(5, 3, 9, 9), None).top1_agreement is None
    with pytest.raises(RepfuseError, match="labels"):
        agreement(dense, dense, torch.randn(5, 3, 9, 9), torch.zeros(5).long())


@pytest.mark.parametrize("data", [torch.randn(2, 4, 9, 9), torch.randn(0, 3, 9, 9), []])
def test_data_that_does_not_fit_is_bad_input(data):
    with pytest.raises(RepfuseError, match="data"):
        agreement(network(), network(), data, None)


def test_where_rounding_is_not_measured_the_median_counts_until_it_is():
    original, trials = network(), [Trial(str(n), example(size=n), sampled=n in (4, 6, 8)) for n in (9, 4, 6, 8)]
    fused, keys = folded(original), [(position, "out") for position in range(4)]
    effect = RoundingEffects(fused, original, trials, run_float64(fused, trials))
    effect.measure_usual()
    first, *others = effect.levels(keys).values()
    assert effect.measured == {1, 2, 3}
    assert first.rms == sorted(level.rms for level in others)[1] > 0
    effect.measure([0])
    assert effect.levels(keys)[0, "out"] != first and effect.levels(keys)[1, "out"] == others[0]


def test_without_a_sample_rounding_is_measured_on_the_cheapest_input_that_is_taken():
    original = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    trials = [Trial(str(n), (torch.randn(n, 3, size, 4),), sampled=size == 2) for n, size in ((2, 4), (1, 4), (1, 2))]
    effect = RoundingEffects(original, nn.Identity(), trials, run_float64(original, trials))
    effect.measure_usual()
    assert effect.measured == {1}
