"""Products with constant matrices are layers, however they are spelled: against torch, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.meanings import meaning
from torch import nn

from repfuse.algebra.expression import Scaled, Through
from repfuse.algebra.layers import Convolution, Factor
from repfuse.ops.meaning import Unfusible

SETTINGS = settings(deadline=None, max_examples=min(60, settings().max_examples))
SIZES = (2, 4, 3, 5, 2, 2)
aten = torch.ops.aten


class Matrix(nn.Module):
    """Holds a matrix."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def layer_of(said: object) -> Convolution | None:
    assert said is None or isinstance(said, Unfusible | Scaled | Through), said
    return said.layer if isinstance(said, Through) else None


@SETTINGS
@given(st.data())
def test_an_einsum_that_puts_one_letter_for_another_is_a_layer(data):
    """``y[.., k, ..] = sum over c of x[.., c, ..] w[k, c]`` in any letters; what else it might be is none."""
    rank = data.draw(st.integers(2, 6))  # the last axis takes size 1 too, unless it is axis 1
    letters = data.draw(st.permutations("abcdefgXYZ"))
    x, new = "".join(letters[:rank]), letters[rank]
    axis = data.draw(st.integers(0, rank - 1))
    w = data.draw(st.permutations([x[axis], new]))
    result = x.replace(x[axis], new)
    moved = "".join(data.draw(st.one_of(st.just(result), st.permutations(result))))
    first = data.draw(st.booleans())
    equation = f"{''.join(w)},{x}->{moved}" if first else f"{x}, {''.join(w)} -> {moved}"
    matrix = Matrix(*(SIZES[axis] if letter == x[axis] else 6 for letter in w))

    def run(m, x, y):
        return torch.einsum(equation, *((m.m.w, x) if first else (x, m.m.w)))

    layer = layer_of(meaning(run, SIZES[:rank], m=matrix))
    assert (layer is not None) == (moved == result and axis == 1 and rank <= 5)  # no layer has four axes of space
    if layer is not None:
        assert layer.weight == "m.w" and layer.geometry.ndim == (0 if axis == rank - 1 else rank - 2)


@pytest.mark.parametrize(
    "matrix",
    [
        lambda m: m.m.w,
        lambda m: m.m.w * 2,
        lambda m: m.m.w.transpose(0, -2),
        lambda m: m.m.w.permute(0, 1),
        lambda m: m.m.w.data,
        lambda m: m.m.w[:, :3],
    ],
)
def test_a_matrix_that_is_not_written_as_a_transpose_is_the_weight_turned(matrix):
    layer = layer_of(meaning(lambda m, x, y: x @ matrix(m), (2, 5), m=Matrix(5, 4)))
    assert layer is not None and layer.order == (1, 0)


POINT = [
    lambda m, x, y: torch.einsum("bchw,kc->bkhw", [x, m.m.w]),
    lambda m, x, y: aten.einsum.default("bchw,kc->bkhw", [x, m.m.w]),
    lambda m, x, y: torch.einsum("bc...,kc->bk...", x, m.m.w),
    lambda m, x, y: torch.einsum("kc,bchw->bkhw", m.m.w * 2, x),
    lambda m, x, y: torch.einsum("bdhw,kd", x, m.m.w).permute(0, 3, 1, 2),
]


@pytest.mark.parametrize("function", POINT[:4])
def test_spellings_of_a_point(function):
    layer = layer_of(meaning(function, (2, 4, 3, 5), m=Matrix(6, 4)))
    assert layer is not None and layer.geometry.kernel == (1, 1) and layer.bias is None


ROWS = [
    lambda m, x, y: x @ m.m.w,
    lambda m, x, y: torch.matmul(x, m.m.w[None]),
    lambda m, x, y: torch.einsum("...c,ck->...k", m.f(x), m.m.w),
    lambda m, x, y: torch.einsum("abc,cd", m.f(x), m.m.w),
    lambda m, x, y: torch.einsum("...c,cd", m.f(x), m.m.w),
    lambda m, x, y: torch.tensordot(m.f(x), m.m.w, 1),
    lambda m, x, y: torch.tensordot(m.f(x), m.m.w, dims=([-1], [0])),
    lambda m, x, y: torch.tensordot(m.f(x), m.m.w.t(), ((2,), (1,))),
    lambda m, x, y: torch.tensordot(m.f(x), m.m.w, ([-1], [-2])),
    lambda m, x, y: aten.tensordot.default(m.f(x), m.m.w, [-1], [-2]),
    lambda m, x, y: torch.bmm(x, m.m.w.expand(x.size(0), -1, -1)),
    lambda m, x, y: torch.bmm(x, m.m.w.unsqueeze(0).expand(x.shape[0], 4, 6)),
]
COLUMNS = [
    lambda m, x, y: m.m.w @ x,
    lambda m, x, y: torch.matmul(m.m.w[None], x),
    lambda m, x, y: torch.bmm(m.m.w.expand(x.size(0), -1, -1), x),
    lambda m, x, y: aten.bmm.default(m.m.w.expand(x.size(0), -1, -1), x),
]


@pytest.mark.parametrize("function", ROWS)
def test_spellings_of_a_linear_layer(function):
    layer = layer_of(meaning(function, (2, 3, 4), m=Matrix(4, 6), f=nn.Linear(4, 4)))
    assert layer is not None and layer.geometry.weight_shape == (6, 4)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, x, y: torch.tensordot(x, m.m.w, ([1], [0])), (4, 6)),
        (lambda m, x, y: torch.tensordot(x, m.m.w, 0), (4, 6)),
        (lambda m, x, y: torch.tensordot(x, m.m.w, 2), (4, 4)),
        (lambda m, x, y: torch.tensordot(x, m.m.w), (4, 4)),
        (lambda m, x, y: torch.tensordot(x, m.m.w, ([-1], [0])), (1, 6)),
        (lambda m, x, y: torch.tensordot(x, y, ([0, 1, 2], [0, 1, 2])), (4, 6)),
        (lambda m, x, y: torch.tensordot(x, m.m.w, 1, out=x.new_empty(x.size(0), 4, 6)), (4, 6)),
        (lambda m, x, y: torch.matmul(m.m.w[None, None], x), (6, 4)),  # an axis more than the tensor
        (lambda m, x, y: torch.matmul(x[:, 0], m.m.w[None]), (4, 6)),
        (lambda m, x, y: torch.bmm(x, m.m.w.expand(x.size(0), -1, 6)), (4, 1)),  # one column, six times
        (lambda m, x, y: torch.matmul(m.m.w.expand(y.size(0), -1, -1), x), (6, 4)),  # of x there may be one, of y more
    ],
)
def test_other_products_of_tensors_are_no_layer(function, shape):
    assert layer_of(meaning(function, (2, 4, 4), m=Matrix(*shape))) is None


@pytest.mark.parametrize("function", COLUMNS)
def test_spellings_of_a_point_of_tokens(function):
    layer = layer_of(meaning(function, (2, 4, 3), m=Matrix(6, 4)))
    assert layer is not None and layer.geometry.weight_shape == (6, 4, 1)


def test_an_einsum_without_a_sum_is_a_scale_of_channels():
    def said(equation, size):
        return meaning(lambda m, x, y: torch.einsum(equation, x, m.m.w), (2, 4, 3, 5), m=Matrix(size))

    assert said("bchw,c->bchw", 4) == Scaled("x", Factor("m.w"), 1)
    refused = said("bcht,t->bcht", 5)  # of an image one pixel wide it makes five
    assert isinstance(refused, Unfusible) and refused.code == "broadcast"


def test_another_weight_in_each_row_is_refused():
    said = meaning(lambda m, x, y: torch.einsum("bchw,khc->bkhw", x, m.m.w), (2, 4, 3, 5), m=Matrix(6, 3, 4))
    assert isinstance(said, Unfusible) and said.code == "broadcast"


ELSE = [
    ("bchw,c->bhw", (4,)),
    ("bchw,c->bch", (4,)),
    ("bchw,kc->bk", (6, 4)),
    ("bchw,kc->bkwh", (6, 4)),
    ("bchw,khc->bkhw", (6, 3, 4)),
    ("bchw,bkc->bkhw", (2, 6, 4)),
    ("bchw,kc->bkchw", (6, 4)),
    ("bchw,k->bkhw", (6,)),
    ("bchw,kh->bckw", (6, 3)),
    ("bchw,kc->bkhw", (6, 1)),
    ("bchw,cc->bchw", (4, 4)),
    ("bc...,kc...->bk...", (6, 4, 3, 5)),
    ("bc...,kc...->bk...", (6, 4, 5)),
    ("bchw,...kc->...bkhw", (2, 6, 4)),
]


@pytest.mark.parametrize(("equation", "shape"), ELSE)
def test_an_einsum_that_does_something_else_is_no_layer(equation, shape):
    assert layer_of(meaning(lambda m, x, y: torch.einsum(equation, x, m.m.w), (2, 4, 3, 5), m=Matrix(*shape))) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: x @ y.transpose(1, 2),
        lambda m, x, y: torch.einsum("btc,bsc->bts", x, y),
        lambda m, x, y: torch.bmm(x, m.m.w),
        lambda m, x, y: m.m.w.transpose(1, 2) @ x.transpose(1, 2),
        lambda m, x, y: torch.einsum("btc,ck,kd->btd", x, m.m.w[0], m.m.w[0].t()),
    ],
)
def test_products_of_data_or_with_a_matrix_for_each_are_no_layers(function):
    assert layer_of(meaning(function, (2, 3, 4), m=Matrix(2, 4, 3))) is None


def test_the_letters_of_the_same_equation_do_not_matter():
    said = set()
    for b, c, k, h in itertools.permutations("kbhc"):
        equation = f"{b}{c}{h},{k}{c}->{b}{k}{h}"
        said.add(str(meaning(lambda m, x, y, e=equation: torch.einsum(e, x, m.m.w), (2, 4, 3), m=Matrix(6, 4))))
    assert len(said) == 1
