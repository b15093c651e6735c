"""Depthwise convolutions in float64 by their definition: what PyTorch computes, and only where that is meant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from repfuse.checking.runs import FEW_PIXELS, Depthwise


class Seen(TorchFunctionMode):
    """Counts the convolutions that reach PyTorch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.conv1d, torch.conv2d, torch.conv3d)
        return func(*args, **(kwargs or {}))


def both(ndim, *args):
    """Return a convolution by PyTorch, and under the mode with how many of them PyTorch did."""
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[ndim - 1]
    expected = convolve(*args)
    with Seen() as seen, Depthwise():
        found = convolve(*args)
    return expected, found, seen.count


def drawn(ndim, channels, size, kernel, dtype=torch.float64, multiplier=1):
    x = torch.randn(2, channels, *size, dtype=dtype)
    return (
        x,
        torch.randn(channels * multiplier, 1, *kernel, dtype=dtype),
        torch.randn(channels * multiplier, dtype=dtype),
    )


@given(st.data())
def test_it_is_what_pytorch_computes(data):
    ndim = data.draw(st.integers(1, 3))
    each = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(ndim))  # noqa: E731
    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 3)
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + more
        for d, k, p, more in zip(dilation, kernel, padding, each(0, 4), strict=True)
    )
    x, weight, bias = drawn(ndim, data.draw(st.integers(2, 4)), size, kernel)
    given_bias = bias if data.draw(st.booleans()) else None
    expected, found, count = both(ndim, x, weight, given_bias, stride, padding, dilation, len(weight))
    assert count == 0 and found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_other_convolutions_are_left_to_pytorch():
    x, weight, bias = drawn(2, 4, (6, 6), (3, 3))
    rest = ((1, 1), (1, 1), (1, 1))
    many = torch.randn(1, 4, 64, FEW_PIXELS // 64 + 1, dtype=torch.float64)
    wide = drawn(2, 4, (6, 6), (3, 3), multiplier=2)
    for args in (
        (x.float(), weight.float(), bias.float(), *rest, 4),  # PyTorch has a kernel for it
        (x[0], weight, bias, *rest, 4),  # without a batch
        (many, weight, bias, *rest, 4),
        (*wide, *rest, 4),  # two outputs of each channel
        (x, torch.randn(4, 4, 3, 3, dtype=torch.float64), bias, *rest, 1),
        (x, weight, bias, (1, 1), "same", (1, 1), 4),
        (x, weight, bias, 1, (1, 1), (1, 1), 4),  # a number for both axes
        (x, weight, bias, (1,), (1,), (1,), 4),
    ):
        expected, found, count = both(2, *args)
        assert count == 1 and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_a_wrong_setting_shows(name):
    x, weight, bias = drawn(2, 4, (9, 8), (3, 3))
    settings = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    wrong = settings | {name: (2, 1)}
    with Depthwise():
        right, other = (F.conv2d(x, weight, bias, groups=4, **each) for each in (settings, wrong))
        taken, too = (torch.conv2d(x, weight, bias, *each.values(), 4) for each in (settings, wrong))
    assert torch.allclose(taken, right) and torch.allclose(too, other)
    assert taken.shape != too.shape or not torch.allclose(taken, too)


def test_none_of_a_batch_and_too_few_pixels_are_as_in_pytorch():
    x, weight, bias = drawn(2, 4, (6, 6), (3, 3))
    expected, found, _ = both(2, x[:0], weight, bias, (1, 1), (0, 0), (1, 1), 4)
    assert found.shape == expected.shape == (0, 4, 4, 4)
    for size, dilation in ((2, 1), (1, 1), (6, 3)):
        with Depthwise(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            torch.conv2d(x[..., :size, :size], weight, bias, (1, 1), (0, 0), (dilation, dilation), 4)
