"""A linear layer between what puts the channels last and what puts them back is a 1x1."""

from __future__ import annotations

import pytest
import torch
from blocks import C, Spelled, conv
from support.agreement import error, image, operations, randomised
from torch import nn
from torch.nn import functional as F

from repfuse.fusing import fuse

LAST, BACK = (0, 2, 3, 1), (0, 3, 1, 2)
TURNED = {
    "permuted": lambda m, x: m.l(x.permute(LAST)).permute(BACK),
    "moved": lambda m, x: torch.movedim(m.l(x.movedim(1, -1)), -1, 1),
    "transposed twice": lambda m, x: m.l(x.transpose(1, 2).transpose(2, 3)).transpose(2, 3).transpose(1, 2),
    "contiguous": lambda m, x: m.l(x.permute(LAST).contiguous()).permute(BACK).contiguous(),
    "copied": lambda m, x: m.l(x.permute(LAST).clone()).permute(BACK),
    "a function": lambda m, x: F.linear(x.permute(LAST), m.l.weight).permute(BACK),
    "a product": lambda m, x: (x.permute(LAST) @ m.l.weight).permute(BACK),
    "rows": lambda m, x: m.l(x.permute(LAST).reshape(-1, C)).view(x.shape[0], *x.shape[2:], C).permute(BACK),
    "tokens": lambda m, x: m.l(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape),
    "tokens, as it was": lambda m, x: m.l(x.flatten(2).mT).mT.view_as(x),
    "a table": lambda m, x: (m.l.weight @ x.flatten(2)).view(x.shape),
    "of one axis": lambda m, x: m.p(x.flatten(2)).unflatten(2, x.shape[2:]),
    "of one axis more": lambda m, x: m.v(x[:, :, :, :, None]).squeeze(4),
    "rows first": lambda m, x: m.l(x.permute(2, 3, 0, 1)).permute(2, 3, 0, 1),
}
AROUND = {
    "before it": lambda turned: lambda m, x: turned(m, m.a(x)),
    "beside it": lambda turned: lambda m, x: turned(m, x) + m.a(x) + x,
    "after it": lambda turned: lambda m, x: m.a(turned(m, x)),
    "twice": lambda turned: lambda m, x: turned(m, turned(m, x)),
}


def around(turned, where):
    members = {
        "l": nn.Linear(C, C),
        "p": nn.Conv1d(C, C, 1),
        "v": nn.Conv3d(C, C, 1),
        "a": conv(3, padding=0 if where == "after it" else 1),
    }
    return randomised(Spelled(AROUND[where](turned), **members))


@pytest.mark.parametrize("where", AROUND)
@pytest.mark.parametrize("name", TURNED)
def test_a_linear_layer_between_turns_is_a_1x1(name, where):
    network, x = around(TURNED[name], where), image(2, C, 6, 5)
    fused = fuse(network, (x,), keep_class=False).module
    found = operations(fused, x)
    assert (found["convolution"], found["mm"] + found["addmm"] + found["bmm"]) == (1, 0)
    for shape in ((2, C, 6, 5), (1, C, 4, 9), (3, C, 3, 3)):
        assert error(network, fused, image(*shape)) < 1e-12


def rows_read(m, x):
    rows = x.permute(LAST)
    return m.l(rows).permute(BACK) * rows.mean()


def result_read(m, x):
    made = m.l(x.permute(LAST))
    return made.permute(BACK) * made.mean()


TURNED_ELSEWHERE = {
    "not back": lambda m, x: m.l(x.permute(LAST)).permute(0, 3, 2, 1),
    "other channels": lambda m, x: m.l(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3),
    "rows of two pixels": lambda m, x: m.l(x.reshape(x.shape[0], 2, -1, C)).reshape(x.shape),
    "another order of rows": lambda m, x: (
        m.l(x.permute(LAST).reshape(-1, C)).view(*x.shape[2:], x.shape[0], C).permute(2, 3, 0, 1)
    ),
    "between them an activation": lambda m, x: torch.tanh(m.l(x.permute(LAST))).permute(BACK),
    "rows that others read": rows_read,
    "what it makes, that others read": result_read,
}


@pytest.mark.parametrize("name", TURNED_ELSEWHERE)
def test_what_does_not_put_each_row_back_is_none(name):
    network, x = around(TURNED_ELSEWHERE[name], "beside it"), image(2, C, 4, 4)
    found = fuse(network, (x,), keep_class=False)
    assert "differs" not in {refusal.code for refusal in found.plan.refusals}
    assert operations(found.module, x)["mm"] + operations(found.module, x)["addmm"] == 1
    for shape in ((2, C, 4, 4), (3, C, 4, 4), (1, C, 4, 4)):
        assert error(network, found.module, image(*shape)) < 1e-12


@pytest.mark.parametrize(
    "turned",
    [
        lambda m, x: m.k(x.transpose(2, 3)).transpose(2, 3),
        lambda m, x: F.avg_pool2d(x.transpose(2, 3), 1).transpose(2, 3),
    ],
)
def test_turns_around_what_is_no_layer_of_pixels(turned):
    """A kernel between transposes is the kernel transposed, and a pool is no layer."""
    network = randomised(
        Spelled(
            lambda m, x: turned(m, x) + m.a(x) + x, k=nn.Conv2d(1, 1, 3, padding=1), a=nn.Conv2d(1, 1, 3, padding=1)
        )
    )
    found = fuse(network, (image(2, 1, 6, 5),), keep_class=False)
    assert found.plan.sites
    assert "differs" not in {refusal.code for refusal in found.plan.refusals}
    for shape in ((2, 1, 6, 5), (1, 1, 4, 9)):
        assert error(network, found.module, image(*shape)) < 1e-12


def test_what_is_turned_there_and_back_may_have_other_readers():
    """The turns next to the layer are enough; those before them put back what they took themselves."""

    def forward(m, x):
        again = x.permute(LAST).permute(BACK)
        return m.l(again.permute(LAST)).permute(BACK) + m.a(again) + again * again.mean()

    network, x = randomised(Spelled(forward, l=nn.Linear(C, C), a=conv(3, padding=1))), image(2, C, 6, 5)
    fused = fuse(network, (x,), keep_class=False).module
    found = operations(fused, x)
    assert (found["convolution"], found["mm"] + found["addmm"]) == (1, 0)
    assert error(network, fused, image(1, C, 4, 9)) < 1e-12


@pytest.mark.parametrize("axes", [3, 4])
def test_a_1x1_has_three_spatial_axes_at_most(axes):
    """PyTorch has no convolution of four."""

    def forward(m, x):
        turned = m.l(x.movedim(1, -1)).movedim(-1, 1)
        return turned + m.a(x) if axes == 3 else turned + x

    network, x = (
        randomised(Spelled(forward, l=nn.Linear(C, C), a=nn.Conv3d(C, C, 3, padding=1))),
        image(2, C, *(3,) * axes),
    )
    found = fuse(network, (x,), keep_class=False)
    assert "differs" not in {refusal.code for refusal in found.plan.refusals}
    left = operations(found.module, x)
    assert (left["convolution"], left["mm"] + left["addmm"]) == ((1, 0) if axes == 3 else (0, 1))
    assert error(network, found.module, image(1, C, *(2,) * axes)) < 1e-12


def test_a_turn_that_some_sizes_alone_have_is_none():
    def forward(m, x):
        made = m.l(x.permute(LAST))
        return (made.contiguous().permute(BACK) if x.shape[2] == 6 else made.permute(BACK)) + m.a(x) + x

    network, x = randomised(Spelled(forward, l=nn.Linear(C, C), a=conv(3, padding=1))), image(2, C, 6, 5)
    found = fuse(network, (x,), keep_class=False)
    assert {refusal.code for refusal in found.plan.refusals} == {"changes-with-size"}
    for shape in ((2, C, 6, 5), (1, C, 4, 9)):
        assert error(network, found.module, image(*shape)) < 1e-12


IN_ROWS = {
    "by reshape": lambda m, x: m.l(x.reshape(-1, 6)).view(*x.shape[:-1], 4),
    "by flatten": lambda m, x: m.l(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
    "by addmm": lambda m, x: torch.addmm(m.l.bias, x.view(-1, 6), m.l.weight.T).view(x.shape[0], x.shape[1], 4),
    "another axis first": lambda m, x: m.l(x.transpose(0, 1)).transpose(0, 1),
    "by a convolution": lambda m, x: m.p(x.transpose(1, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("name", IN_ROWS)
def test_a_layer_of_rows_is_one_of_tokens(name):
    """Beside a linear layer of the same tokens it becomes one with that."""
    members = {"l": nn.Linear(6, 4), "b": nn.Linear(6, 4), "p": nn.Conv1d(6, 4, 1)}
    network, x = randomised(Spelled(lambda m, x: IN_ROWS[name](m, x) + m.b(x), **members)), image(2, 5, 6)
    fused = fuse(network, (x,), keep_class=False).module
    found = operations(fused, x)
    assert (found["convolution"], found["addmm"], found["mm"]) == (0, 1, 0)
    for shape in ((2, 5, 6), (1, 9, 6), (4, 1, 6)):
        assert error(network, fused, image(*shape)) < 1e-12


def test_a_layer_of_one_channel_between_turns_is_a_1x1():
    network, x = (
        randomised(Spelled(lambda m, x: m.l(x.transpose(1, 2)).transpose(1, 2) + x, l=nn.Linear(1, 1))),
        image(2, 1, 6),
    )
    fused = fuse(network, (x,), keep_class=False).module
    found = operations(fused, x)
    assert (found["convolution"], found["mm"] + found["addmm"] + found["add"]) == (1, 0)
    assert error(network, fused, image(3, 1, 4)) < 1e-12


def test_the_first_axis_but_one_is_another_at_other_ranks():
    """The same turns leave the channels on axis 1 of three, which a 1x1 of two spatial axes would not."""
    network = randomised(Spelled(lambda m, x: m.l(x.transpose(1, -1)).transpose(1, -1) + x, l=nn.Linear(C, C)))
    found = fuse(network, (image(2, C, C, 5),), keep_class=False)
    assert "differs" not in {refusal.code for refusal in found.plan.refusals}
    for shape in ((2, C, C, 5), (2, C, 6, 5), (C, C, 5), (3, C, 7)):
        assert error(network, found.module, image(*shape)) < 1e-12


def test_axes_are_counted_in_each_rank_that_a_network_takes():
    """Of one sequence, a 1x1 has its channels on the first axis: it is no layer of tokens then."""
    members = {"q": nn.Conv2d(6, 4, 1), "b": nn.Linear(6, 4)}
    network = randomised(Spelled(lambda m, x: m.q(x.mT[..., None]).squeeze(-1).mT + m.b(x), **members))
    fused = fuse(network, (image(2, 5, 6),), keep_class=False).module
    for shape in ((2, 5, 6), (1, 9, 6), (5, 6)):
        assert error(network, fused, image(*shape)) < 1e-12


@pytest.mark.parametrize(
    "rows",
    [
        lambda m, x: m.l(x.reshape(-1, 6)).view(x.shape[1], x.shape[0], 4).transpose(0, 1),
        lambda m, x: m.l(x.transpose(0, 1)).reshape(x.shape[0], x.shape[1], 4),
    ],
)
def test_rows_that_go_elsewhere_stay(rows):
    members = {"l": nn.Linear(6, 4), "b": nn.Linear(6, 4)}
    network, x = randomised(Spelled(lambda m, x: rows(m, x) + m.b(x), **members)), image(3, 3, 6)
    fused = fuse(network, (x,), keep_class=False).module
    assert operations(fused, x)["addmm"] + operations(fused, x)["mm"] == 2
    for shape in ((3, 3, 6), (1, 5, 6), (4, 2, 6)):
        assert error(network, fused, image(*shape)) < 1e-12
