"""What rounding explains where few samples do not tell: no correct network is flagged, no wrong one excused."""

from __future__ import annotations

import copy

import pytest
import torch
from support.agreement import randomised
from support.folded import example, folded, network
from torch import nn
from torch.nn import functional as F

from repfuse.checking.drift import gather
from repfuse.checking.inputs import input_variants
from repfuse.checking.results import Level
from repfuse.checking.rounding import RoundingEffects, allowed, explained
from repfuse.checking.verification import verify
from repfuse.converting import convert
from repfuse.loading import Checkpoint


class Zero(nn.Module):
    """A sum of branches whose kernels sum to 0: of a constant image nothing is left but what rounding makes."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(self.norm(self.a(x)) + self.b(x))


@torch.no_grad()
def zero_sums(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two branches of zero-sum kernels; where there is no bias anywhere, a constant image gives exactly nothing."""
    model = randomised(Zero(bias))
    for conv in (model.a, model.b):
        conv.weight -= conv.weight.mean(dim=(2, 3), keepdim=True)
    if not bias:
        model.norm.bias.zero_()
        model.norm.running_mean.zero_()
    return model.to(dtype)


@torch.no_grad()
def dead() -> nn.Module:
    """Most channels are switched off by a normalisation, some by a bias that no input overcomes."""
    model = network(3)
    model[0][1].weight[2:] = 0
    model[0][4].bias[:6] = -1e6
    return model


@torch.no_grad()
def unbiased() -> nn.Module:
    """Nothing is added anywhere: where the input is 0, so is all that follows."""
    model = network(3, classes=0)
    for norm in (model[0][1], model[0][4], model[0][7]):
        norm.bias.zero_()
        norm.running_mean.zero_()
    return model


class Centred(nn.Module):
    """Takes the mean of each channel off and divides by what is left: of an even image, little is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        y = y - y.mean(dim=(2, 3), keepdim=True)
        return y / (y.square().mean(dim=(2, 3), keepdim=True) + 1e-30).sqrt()


class WildAt(nn.Module):
    """Amplifies every error beyond measure on images of the sizes given, and of no others."""

    def __init__(self, inner: nn.Module, *sizes: int) -> None:
        super().__init__()
        self.inner, self.sizes = inner, sizes

    def forward(self, x):
        y = self.inner(x)
        return (1e6 * y).sin() if x.shape[-1] in self.sizes else y


def checkpoint(model: nn.Module, inputs, folder) -> Checkpoint:
    return Checkpoint(model, inputs, "pt", folder / "in.pt", "", None, "given", ())


MODELS = {
    "zero sums": zero_sums,
    "zero sums, biased": lambda: zero_sums(bias=True),
    "dead channels": dead,
    "no biases": unbiased,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_correct_conversion_is_not_flagged(name, dtype, tmp_path):
    original = MODELS[name]().to(dtype)
    inputs = example(dtype, size=16)
    conversion = convert(checkpoint(original, inputs, tmp_path))
    assert conversion.plan.sites
    assert conversion.passed, (conversion.proof.reason, conversion.drift)
    verification = verify(original, conversion.module, inputs)
    assert verification.verdict == "same", verification.reason


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_one_is(name):
    original = MODELS[name]()
    wrong = copy.deepcopy(original)
    with torch.no_grad():
        next(wrong.parameters())[0, 0, 1, 1] += 1e-3
    assert verify(original, wrong, example(size=16)).verdict == "different"


def test_an_input_that_amplifies_more_than_the_sampled_ones_is_measured_before_it_is_judged():
    original = WildAt(network(2, classes=0), 16)
    fused = WildAt(folded(original.inner), 16)
    trials = [trial for trial in input_variants(example(size=16)) if trial.shapes[0][-1] != 16 or not trial.sampled]
    found = gather(original, fused, trials, lambda _stage, _fraction: None)
    assert found.settled and all(found.trials[position].shapes[0][-1] == 16 for position in found.settled)
    assert all(found.excess(key) <= 1 for key in found.outputs)
    assert found.drift is not None and found.drift.passed


def test_an_even_image_that_is_normalised_is_no_alarm():
    original = Centred(zero_sums())
    assert verify(original, Centred(copy.deepcopy(original.inner).double().float()), example(size=16)).verdict == "same"
    folded_one = Centred(folded(unbiased()))
    assert verify(Centred(unbiased()), folded_one, example(size=16)).verdict == "same"


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 3)])
def test_a_sample_that_amplifies_beyond_measure_excuses_nothing(sizes):
    original = WildAt(network(2, classes=0), *sizes)
    wrong = WildAt(folded(original.inner), *sizes)
    with torch.no_grad():
        wrong.inner[0][3].weight[0, 0, 1, 1] += 1e-3
    verification = verify(original, wrong, example(size=16))
    assert verification.verdict == "different"
    assert verify(original, WildAt(folded(original.inner), *sizes), example(size=16)).verdict == "same"


def test_what_is_judged_different_was_measured_there():
    original = network(2)
    wrong = folded(original)
    with torch.no_grad():
        wrong[0][3].weight[0, 0, 1, 1] += 0.1
    found = gather(original, wrong, input_variants(example(size=16)), lambda _stage, _fraction: None)
    assert found.excess(found.worst) > 1 and found.worst[0] in found.settled
    assert len(found.settled) == 1  # one is enough


class Ordered(RoundingEffects):
    """A network whose rounding explains nothing, and the order of its sums what is given."""

    def __init__(self, order: float) -> None:
        self.measured: set[int] = set()
        self._order_explains = order

    def measure_usual(self) -> None:
        pass

    def measure(self, positions) -> None:
        self.measured |= set(positions)

    def cheapest(self, positions) -> int:
        return min(positions)

    def levels(self, keys):
        return dict.fromkeys(keys, Level(0.0, 0.0))

    def order(self, position):
        return {(position, "out"): Level(self._order_explains, self._order_explains)}


@pytest.mark.parametrize(("order", "stands"), [(1e-9, False), (1e-12, True)])
def test_the_order_of_summation_counts_where_it_is_amplified(order, stands):
    error = {(0, "out"): Level(1e-10, 1e-10)}
    effects, settled = explained(Ordered(0), Ordered(order), error)
    assert settled == {0} and error[0, "out"].exceeds(allowed(effects)[0, "out"]) is stands


def test_an_error_without_a_limit_is_not_too_much():
    infinite = Level(float("inf"), float("inf"))
    assert infinite.over(infinite) == Level(1.0, 1.0).over(infinite) == 0
    assert infinite.over(Level(1.0, 1.0)) == float("inf")


# --- outputs that say nothing, and progress ----------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, second) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 4, 1), second

    def forward(self, x):
        y = self.conv(x)
        return y, self.second(y)


@pytest.mark.parametrize("second", [lambda y: y * 0, lambda y: y * float("nan"), lambda y: y[:0]])
def test_an_output_that_says_nothing_is_named(second):
    original = Two(second)
    verification = verify(original, original, example())
    assert verification.verdict == "same"
    assert any("Nothing can be said of out[1]:" in note for note in verification.notes)
    assert not any("Nothing can be said" in note for note in verify(*[Two(torch.sin)] * 2, example()).notes)


def test_progress_tells_each_stage_and_never_goes_back():
    seen: list[tuple[str, float]] = []
    original = network(2)
    verify(original, folded(original), example(size=32), progress=lambda *each: seen.append(each))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert len(dict.fromkeys(stage for stage, _ in seen)) >= 5
