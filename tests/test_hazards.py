"""Writes in place: a graph says who reads a value, not that its memory was changed in between."""

from __future__ import annotations

import operator

import pytest
import torch
from blocks import Spelled, conv
from support.agreement import error, image, randomised
from torch import nn
from torch.nn import functional as F

from repfuse.fusing import fuse
from repfuse.planning.planner import plan


class Secret(nn.Module):
    """Asks for values, and writes into what it is given."""

    def forward(self, x):
        if x.isfinite().all():
            x.mul_(3)
        return x


class Passing(nn.Module):
    """Asks for values, and returns what it is given."""

    def forward(self, x, y):
        return y if x.isfinite().all() else x


def between(write):
    """A value that is written by ``write`` between the two convolutions that read it."""

    def forward(m, x):
        source = torch.sin(x)
        first = m.a(source)
        write(m, source)
        return first + m.b(source)

    return forward


def kept(keep, write=lambda s: s.relu_()):
    """A value kept by ``keep`` before it is written by ``write``; both convolutions read what was kept."""

    def forward(m, x):
        source = torch.sin(x)
        before = keep(m, source)
        write(source)
        return m.a(before) + m.b(before)

    return forward


def kept_for_others_too(m, x):
    source = torch.sin(x)
    before = source.clone()
    source.relu_()
    return F.relu(m.a(before) + m.b(before)) * torch.cos(before)


def written_then_read(m, x):
    y = m.a(x)
    z = y.view(y.shape)
    y += m.b(x)
    return F.relu(y) + F.relu(z)


def written_twice(m, x):
    y = torch.sin(x)
    y += m.a(y)
    y = F.relu(y)
    y += m.b(torch.cos(x))
    return y


def view_of_a_skip(add):
    """The skip is overwritten by the sum, and a view of it, made before, is read after."""

    def forward(m, x):
        skip = torch.sin(x)
        view = skip.view(skip.shape)
        return F.relu(add(skip, m.a(skip) + m.b(skip))) + F.relu(view)

    return forward


def stacked_before(m, x):
    """What the stack holds is what was there when it was made."""
    s = torch.sin(x)
    both = torch.stack([s, s])
    s.relu_()
    return m.b(both.sum(0))


def bordered_around(m, x):
    """The padded map is a copy: what happens to the source before the border is filled is not seen in it."""
    s = torch.sin(x)
    padded = F.pad(s, (1, 1, 1, 1))
    s.relu_()
    for border in ((..., 0, slice(None)), (..., -1, slice(None))):
        padded[(slice(None), slice(None), slice(border[1], (border[1] + 1) or None))] = 0.0
    padded[:, :, :, 0:1] = 0.0
    padded[:, :, :, -1:] = 0.0
    return m.b(padded)


def input_written(m, x):
    x += m.a(x)
    return torch.sin(x)


def kept_result(m, x):
    y = m.a(x)
    y.relu_()
    return y + m.b(x)


def passed_on(m, x):
    source = torch.sin(x)
    first = m.a(source)
    m.passing(x, source).mul_(2)
    return first + m.b(source)


def passed_on_and_added(m, x):
    source = torch.sin(x)
    other = m.passing(x, source)
    other += m.a(x) + m.b(x)
    return other + F.relu(source)


def foreach_through_a_view(m, source):
    view = source.view(source.shape)
    first = m.a(view)
    torch._foreach_mul_([source], 2)
    return first + m.b(view)


def no_op_after_the_write(m, x):
    source = torch.sin(x)
    summed = m.a(source) + m.b(source)
    source.relu_()
    return (0 + summed) * torch.cos(source)


TRAPS = {
    "relu_": between(lambda m, s: s.relu_()),
    "ReLU(inplace)": between(lambda m, s: m.relu(s)),
    "F.relu inplace": between(lambda m, s: F.relu(s, inplace=True)),
    "F.relu inplace by position": between(lambda m, s: F.relu(s, True)),
    "F.leaky_relu_": between(lambda m, s: F.leaky_relu_(s)),
    "torch.relu_": between(lambda m, s: torch.relu_(s)),
    "iadd": between(lambda m, s: operator.iadd(s, 1)),
    "imul": between(lambda m, s: operator.imul(s, 2)),
    "copy_": between(lambda m, s: s.copy_(s * 2)),
    "out=": between(lambda m, s: torch.mul(s, 2, out=s)),
    "aten": between(lambda m, s: torch.ops.aten.mul_.Scalar(s, 2)),
    "chunk": between(lambda m, s: s.chunk(2, 1)[0].mul_(2)),
    "slice": between(lambda m, s: s[:, :2].mul_(2)),
    "detach": between(lambda m, s: s.detach().mul_(2)),
    "view of a view": between(lambda m, s: s.transpose(1, 2).flatten(2).unsqueeze(0).mul_(2)),
    "data": between(lambda m, s: s.data.mul_(2)),
    "cast": between(lambda m, s: s.double().mul_(2)),
    "contiguous": between(lambda m, s: s.contiguous().mul_(2)),
    "dropout": between(lambda m, s: F.dropout(s, 0.5, False).mul_(2)),
    "Flatten": between(lambda m, s: m.flatten(s).mul_(2)),
    "list": between(lambda m, s: torch._foreach_mul_([s], 2)),
    "by a module": between(lambda m, s: m.secret(s)),
    "list, through a view": lambda m, x: foreach_through_a_view(m, torch.sin(x)),
    "clone": kept(lambda m, s: s.clone()),
    "clone called apart": kept(lambda m, s: m.identity(s.clone())),
    "plus zero": kept(lambda m, s: s + 0),
    "times one": kept(lambda m, s: 1 * s),
    "view written later": kept(lambda m, s: s.clone().contiguous(), lambda s: s.view(-1).mul_(2)),
    "clone read by others": kept_for_others_too,
    "written then read": written_then_read,
    "view of a skip, iadd": view_of_a_skip(operator.iadd),
    "view of a skip, isub": view_of_a_skip(operator.isub),
    "view of a skip, add_": view_of_a_skip(lambda a, b: a.add_(b)),
    "view of a skip, sub_": view_of_a_skip(lambda a, b: a.sub_(b, alpha=2)),
    "input written": input_written,
    "kept result": kept_result,
    "passed on": passed_on,
    "crop": between(lambda m, s: s[:, :, 1:-1].mul_(2)),
    "slice assignment": between(lambda m, s: s.__setitem__((slice(None), 0), 0.0)),
    "stack": stacked_before,
    "border filled later": bordered_around,
    "no-op after the write": no_op_after_the_write,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_no_write_is_lost(trap):
    members = {"relu": nn.ReLU(inplace=True), "flatten": nn.Flatten(0), "secret": Secret(), "passing": Passing()}
    model = randomised(Spelled(TRAPS[trap], a=conv(3), b=conv(1), identity=nn.Identity(), **members))
    x = image(2, 4, 5, 6)
    result = fuse(model, (x,))
    assert error(model, result.module, x) < 1e-12
    assert not any(len(site.branches) > 2 or "skip" in site.branches for site in result.plan.sites)


def test_what_the_model_does_to_its_input_it_still_does():
    model = randomised(Spelled(input_written, a=conv(3)))
    fused, one, other = fuse(model, (image(1, 4, 5, 5),)).module, image(1, 4, 5, 5), image(1, 4, 5, 5)
    with torch.no_grad():
        model(one), fused(other)
    assert torch.equal(one, other)


def before_all(m, x):
    source = torch.sin(x).relu_()
    return m.a(source) + m.b(source)


def onto_a_skip(m, x):
    source = torch.sin(x)
    return source.add_(m.a(source) + m.b(source))


def a_copy(m, x):
    copied = x * 2
    return m.a(x) + copied.sin_() + m.b(x)


HARMLESS = {
    "written twice": written_twice,
    "own result": lambda m, x: operator.iadd(m.a(x), m.b(x)),
    "before all": before_all,
    "after all": lambda m, x: (m.a(x) + m.b(x)).relu_(),
    "another value": lambda m, x: m.a(x) + torch.sin(x).relu_() + m.b(x),
    "onto a skip": onto_a_skip,
    "a copy": a_copy,
    "passed on and added": passed_on_and_added,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_write_that_no_branch_sees_is_no_obstacle(name):
    model = randomised(Spelled(HARMLESS[name], a=conv(3), b=conv(1), passing=Passing()))
    x = image(2, 4, 5, 6)
    result = fuse(model, (x,))
    assert len(result.plan.sites) == 1 and error(model, result.module, x) < 1e-12


def test_statistics_and_inputs_stay_what_they_were():
    """Where values are asked for, the arithmetic is done, in training mode on statistics of a copy."""

    class NeedsValues(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.BatchNorm2d(4), NeedsValues(), nn.ReLU(inplace=True), conv(3), conv(1)).train()
    x = image(2, 4, 5, 5, dtype=torch.float32)
    before, statistics = x.clone(), model[0].running_mean.clone()
    fuse(model, (x,))
    assert torch.equal(x, before) and torch.equal(model[0].running_mean, statistics)
    assert model[0].num_batches_tracked == 0


def _weight_changed(m, x):
    scaled = m.a.weight * 2
    return torch.sin(F.conv2d(x, scaled.add_(1), padding=1) + m.b(x)) + scaled.sum()


def _part_changed(m, x):
    scaled = m.a.weight * 2
    changed = torch.stack([scaled[0].add_(1)] * 4)
    return torch.sin(F.conv2d(x, changed, padding=1) + m.b(x)) + scaled.sum()


def _changed_afterwards(m, x):
    scaled = m.a.weight * 2
    y = torch.sin(F.conv2d(x, scaled, padding=1) + m.b(x))
    scaled.mul_(3)
    return y + scaled.sum()


@pytest.mark.parametrize("forward", [_weight_changed, _part_changed, _changed_afterwards])
def test_a_computed_weight_that_is_overwritten_keeps_its_value_for_others(forward):
    """The write goes on, though the convolution that read its result is gone."""
    model, x = randomised(Spelled(forward, a=conv(3), b=conv(1))), image(2, 4, 6, 7)
    assert error(model, fuse(model, (x,)).module, x) < 1e-12


class WritesIntoWhatItIsGiven(nn.Module):
    """Adds to its input in place, and returns something else."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(3)

    def forward(self, x):
        return self.b(torch.sin(x.add_(self.a(x))))


def test_what_a_block_writes_into_its_input_is_seen_outside():
    """The planner itself leaves it alone: no comparison at some sizes has to find it."""

    def forward(m, x):
        y = torch.sin(x)
        z = m.inner(y)
        return z + y

    model, x = randomised(Spelled(forward, inner=WritesIntoWhatItIsGiven())), image(2, 4, 6, 7)
    found = plan(model, (x,))
    assert not found.sites and "in-place" in {refusal.code for refusal in found.refusals}
