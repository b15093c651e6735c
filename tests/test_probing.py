"""A kernel is read off impulses exactly, and what is no kernel is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import image, randomised
from torch import nn
from torch.nn import functional as F

import repfuse.probing
from repfuse.probing import Refused, recover

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SOURCES = sorted(Path(repfuse.probing.__file__).parent.glob("*.py"))
MAY_IMPORT = ("__future__", "torch", "math", "itertools", "functools", "collections.abc", "dataclasses", "typing")
OPERATORS = ("conv", "unfold", "fold", "linear", "matmul", "functional")


def test_the_package_imports_nothing_of_what_it_checks():
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name in MAY_IMPORT or name.startswith("repfuse.probing.") or name == "repfuse.wording", source


def test_it_loads_without_the_algebra():
    code = "import sys, repfuse.probing; print([m for m in sys.modules if m.startswith('repfuse')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout)
    assert not [name for name in loaded if name.split(".")[1:2] in ([x] for x in ("algebra", "rewriting", "planning"))]


def test_it_calls_no_operator_that_convolves():
    for source in SOURCES:
        called = [node.func for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
        names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}
        assert not [name for name in names if name.startswith(OPERATORS)], source


def dense(weight: torch.Tensor, groups: int, dilation: tuple[int, ...]) -> torch.Tensor:
    """``[out, in / groups, *k]`` without groups and dilation, written out place by place."""
    out, width, *kernel = weight.shape
    spread = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    full = weight.new_zeros(out, width * groups, *spread)
    for o in range(out):
        first = o // (out // groups) * width
        full[(o, slice(first, first + width), *(slice(None, None, d) for d in dilation))] = weight[o]
    return full


@st.composite
def settings_of_convolutions(draw):
    ndim = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    most = 5 if ndim < 3 else 3
    axis = [(st.integers(1, most), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3)) for _ in range(ndim)]
    kernel, stride, dilation, padding = zip(*(tuple(map(draw, one)) for one in axis), strict=True)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return ndim, channels, kernel, stride, dilation, padding, groups, draw(st.booleans())


@given(settings_of_convolutions())
@settings(max_examples=25)
def test_a_convolution_is_recovered_exactly(given):
    ndim, (into, out), kernel, stride, dilation, padding, groups, bias = given
    layer = randomised(CONVOLUTIONS[ndim - 1](into, out, kernel, stride, padding, dilation, groups, bias))
    found = recover(layer, into, ndim)
    assert not found.transposed
    assert found.stride == stride
    assert found.padding == tuple((p, p) for p in padding)
    torch.testing.assert_close(found.weight, dense(layer.weight, groups, dilation), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.bias, layer.bias if bias else torch.zeros(out).double(), rtol=0, atol=0)
    assert all(check.passed for check in found.evidence.checks)


@given(settings_of_convolutions())
@settings(max_examples=15)
def test_a_transposed_convolution_is_recovered_exactly(given):
    ndim, (into, out), kernel, stride, dilation, padding, groups, bias = given
    padding = tuple(min(p, d * (k - 1) // 2) for p, d, k in zip(padding, dilation, kernel, strict=True))
    layer = randomised(TRANSPOSED[ndim - 1](into, out, kernel, stride, padding, 0, groups, bias, dilation))
    x = image(2, into, *range(6, 6 + ndim))
    found = recover(layer, into, ndim)
    assert found.stride == stride
    by_group = layer.weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    full = dense(by_group, groups, dilation)
    flipped = [2 + axis for axis in range(ndim) if stride[axis] == 1]  # by 1 it is a convolution, turned around
    torch.testing.assert_close(found.weight, full.flip(flipped), rtol=0, atol=1e-14)
    assert layer(x).shape[2:] == found.kernel.output_size(x.shape[2:])


def test_a_linear_layer_and_a_scale_of_channels_are_recovered():
    layer = randomised(nn.Linear(5, 3))
    found = recover(layer, 5, 0)
    assert torch.equal(found.weight, layer.weight)
    norm = randomised(nn.BatchNorm2d(4))
    assert recover(norm, 4, 2).weight.shape == (4, 4, 1, 1)


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, 4, 8, 8))

    def forward(self, x):
        return x + F.interpolate(self.position, x.shape[2:])


def quantised(x):
    scale = x.abs().amax() / 127 + 1e-30
    return (x / scale).round() * scale


def first_sample(x):
    return x + x[:1]


def remembering():
    seen = []

    def forward(x):
        seen.append(x)
        return x * (1 + 1e-9 * len(seen))

    return forward


def by_size(x):
    return 2 * x if x.shape[-1] > 20 else x


def written(x):
    return x.mul_(2)


def training(module):
    return module.double().train()


NOT_KERNELS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "hard swish": F.hardswish,
    "softmax": lambda x: x.softmax(1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "instance norm": F.instance_norm,
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "dropout": training(nn.Dropout(0.01)),
    "positions": randomised(Positioned()),
    "average without its padding": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "average, rounded up": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "max pool": nn.MaxPool2d(3, 1, 1),
    "quantised": quantised,
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "one size": nn.AdaptiveAvgPool2d(4),
    "mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "clamped": lambda x: x.clamp(-1e4, 1e4),
    "clamped high": lambda x: x.clamp(-1e10, 1e10),
    "another branch for large values": lambda x: x if float(x.abs().amax()) < 1e4 else 2 * x,
    "another branch for few values": lambda x: x if int((x != 0).sum()) != 4 else 2 * x,
    "almost linear": lambda x: x + 1e-9 * x.abs(),
    "squared a little": lambda x: x + 1e-12 * x * x,
    "other samples": first_sample,
    "memory": remembering(),
    "by size": by_size,
    "in place": written,
    "nothing": lambda x: x * 0,
    "not a number": lambda x: x / 0,
    "float32": lambda x: x.float(),
    "through float32": lambda x: x.float().double(),
    "a tuple": lambda x: (x, x),
    "padded after a bias": randomised(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))),
    "padded between": randomised(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)))),
    **{
        mode: randomised(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode))
        for mode in ("reflect", "replicate", "circular")
    },
}


@pytest.mark.parametrize("name", NOT_KERNELS)
def test_what_is_no_kernel_is_refused_with_a_reason(name):
    with pytest.raises(Refused) as refused:
        recover(NOT_KERNELS[name], 4, 2)
    assert len(str(refused.value)) > 10


KERNELS = {
    "average": nn.AvgPool2d(3, 2, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "shuffled pixels": nn.PixelShuffle(2),
    "cropped": lambda x: x[..., 1:-2, 2:],
    "a row of layers": randomised(
        nn.Sequential(nn.Conv2d(4, 3, 3, 2), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 2), nn.ZeroPad2d((2, 0, 1, 3)))
    )[:3],
    "padded aside": randomised(nn.Sequential(nn.ZeroPad2d((2, 0, 1, 3)), nn.Conv2d(4, 5, 3))),
    "padded by its own constant": lambda x: F.pad(x, (1, 1, 1, 1)) * 2 + 3,
    "a large bias": lambda x: 1e-6 * x + 1e6,
    "by forward": lambda x: x + 2 * F.avg_pool2d(x, 3, 1, 1),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_a_kernel_is_recovered(name):
    block = KERNELS[name]
    found = recover(block, 4, 2)
    x = image(2, 4, 9, 8)
    with torch.no_grad():
        expected = block(x.clone())
    bias = found.bias[:, None, None]
    if found.transposed:
        weight = found.weight.transpose(0, 1)
        got = F.conv_transpose2d(x, weight, stride=found.stride) + bias
    else:
        (top, bottom), (left, right) = found.padding
        got = F.conv2d(F.pad(x, (left, right, top, bottom)), found.weight, stride=found.stride) + bias
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_evidence_has_a_number_for_each_reason():
    evidence = recover(randomised(nn.Conv2d(2, 3, 3, padding=1)), 2, 2).evidence
    names = {check.name for check in evidence.checks}
    assert names == {"determinism", "samples", "superposition", "homogeneity", "inputs", "positions", "border"}
    assert (1, 1) in evidence.sizes and any(a != b for a, b in evidence.sizes) and max(evidence.sizes) > (60, 60)


def test_a_forward_that_looks_at_larger_values_than_were_tried_is_not_found_out():
    """The limit that the documentation of the evidence states."""
    recover(lambda x: x if float(x.abs().max()) < 1e30 else -x, 4, 2)
