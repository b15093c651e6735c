"""Each normalisation that stays is a refusal by its own name, with the reason that keeps it."""

from __future__ import annotations

import pytest
import torch
from blocks import Spelled, conv, conv_norm, norm
from support.agreement import image, randomised
from support.norms import unexplained
from torch import nn
from torch.nn import functional as F

from repfuse.planning.planner import plan

X = image(2, 4, 6, 7)


class Residual(nn.Module):
    """ConvMixer's: the norm is behind the activation."""

    def __init__(self):
        super().__init__()
        self.fn = nn.Sequential(conv(3, groups=4), nn.GELU(), norm())

    def forward(self, x):
        return self.fn(x) + x


def functional(m, x):
    return torch.sin(F.batch_norm(torch.sin(x), m.n.running_mean, m.n.running_var))


def read_twice(m, x):
    y = m.a(x)
    return torch.relu(m.n(y)) + torch.sin(y)


STAY = {
    "behind an activation": (lambda: nn.Sequential(conv(3), nn.GELU(), norm()), {"2": "no-convolution"}),
    "between an activation and a skip": (lambda: nn.Sequential(Residual(), nn.ReLU()), {"0.fn.2": "no-convolution"}),
    "read by a skip, too": (
        lambda: nn.Sequential(conv(1), nn.GELU(), norm(), Residual(), conv(1)),
        {"2": "value-escapes", "3.fn.2": "no-convolution"},
    ),
    "before padding": (lambda: nn.Sequential(nn.ReLU(), norm(), conv(3)), {"1": "shift-before-padding"}),
    "alone": (norm, {"(root): batch_norm": "no-convolution"}),
    "behind what is read twice": (
        lambda: Spelled(read_twice, a=conv(3), n=norm()),
        {"n": "value-escapes"},
    ),
    "of the batch": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)),
        {"1": "training-norm"},
    ),
    "a function": (lambda: Spelled(functional, n=norm()), {"(root): batch_norm": "no-convolution"}),
    "of instances": (
        lambda: nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(4, track_running_stats=True)),
        {"1": "no-convolution"},
    ),
    "in two rows": (lambda: nn.Sequential(nn.ReLU(), norm(), norm()), {"1": "no-convolution", "2": "no-convolution"}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "stay"), STAY.values(), ids=STAY)
def test_each_normalisation_that_stays_says_why(make, stay):
    found = plan(randomised(make()), (X,))
    assert not unexplained(found)
    said = {refusal.where: refusal.code for refusal in found.refusals}
    assert {where: said[where] for where in stay} == stay


def test_the_reason_says_what_stands_beside_it():
    found = plan(randomised(nn.Sequential(conv(3), nn.GELU(), norm(), nn.Sigmoid())), (X,))
    (refusal,) = found.refusals
    assert refusal.where == "2" and "gelu" in refusal.reason and "sigmoid" in refusal.reason and refusal.hint


def test_what_merges_is_no_refusal():
    assert not plan(randomised(nn.Sequential(conv_norm(3), nn.ReLU(), norm(), conv(1))), (X,)).refusals


def test_those_of_an_exported_program_do_too():
    network = randomised(nn.Sequential(conv(3), nn.GELU(), norm(), nn.Sigmoid()))
    found = plan(torch.export.export(network, (X,)).run_decompositions().module(), (X,))
    assert not unexplained(found) and {refusal.code for refusal in found.refusals} == {"no-convolution"}
