"""Dtypes and layouts, alone and mixed; and the proof of networks that fix a dtype in their forward."""

from __future__ import annotations

import pytest
import torch
from blocks import Spelled, conv, norm
from support.agreement import randomised
from support.small_nets import SITES, Net, X
from torch import nn
from torch.nn import functional as F

from repfuse.checking.comparison import reference
from repfuse.checking.drift import drift
from repfuse.checking.inputs import Trial, input_variants
from repfuse.checking.proof import prove
from repfuse.checking.runs import run_float64
from repfuse.fusing import fuse


class NormsInFloat32(Net):
    """bfloat16 with a normalisation in float32, cast by hand."""

    def forward(self, x):
        y = self.stem[1](self.stem[0](x).float()).to(torch.bfloat16)
        return self.tail(self.block(torch.sin(y)))


class SoftmaxInFloat32(Net):
    def forward(self, x):
        return F.softmax(super().forward(x).float(), dim=1).type_as(x)


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class HeadInFloat64(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(super().forward(x).mean((2, 3)).double())


class WithComplex(Net):
    def forward(self, x):
        return super().forward(x) + torch.fft.ifft2(torch.fft.fft2(x) * self.phase).real


class WithSparse(Net):
    def forward(self, x):
        return super().forward(x) + torch.sparse.mm(self.graph, x.flatten(2)[0]).sum()


def bare(make, dtype=torch.float32):
    return randomised(make(), dtype=dtype)


def norms_in_float32():
    model = bare(NormsInFloat32, torch.bfloat16)
    model.stem[1].float()
    return model


def norms_stored_in_float32():
    model = bare(Net, torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def head_in_float64():
    model = bare(HeadInFloat64)
    model.head.double()
    return model


def with_complex():
    model = bare(WithComplex)
    model.phase = nn.Parameter(torch.randn(4, 6, 7, dtype=torch.complex64))
    return model


def with_sparse():
    model = bare(WithSparse)
    model.graph = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
    return model


def with_float8():
    model = bare(Net)
    model.register_buffer("packed", torch.zeros(3).to(torch.float8_e4m3fn))
    return model


def scripted_child():
    model = bare(Net)
    model.block = torch.jit.script(model.block)
    return model


NETS = {  # network, dtype of the input, sites
    "float64": (lambda: bare(Net, torch.float64), torch.float64, SITES),
    "float32": (lambda: bare(Net), torch.float32, SITES),
    "float16": (lambda: bare(Net, torch.float16), torch.float16, SITES),
    "bfloat16": (lambda: bare(Net, torch.bfloat16), torch.bfloat16, SITES),
    "bfloat16, norms cast to float32": (norms_in_float32, torch.bfloat16, SITES - {"stem.0"}),
    "bfloat16, norms stored in float32": (norms_stored_in_float32, torch.bfloat16, SITES),
    "a softmax in float32": (lambda: bare(SoftmaxInFloat32, torch.bfloat16), torch.bfloat16, SITES),
    "a head in float64": (head_in_float64, torch.float32, SITES),
    "autocast": (lambda: bare(Autocast), torch.float32, SITES - {"stem.0"}),  # which is given float32
    "channels last": (lambda: bare(Net).to(memory_format=torch.channels_last), torch.float32, SITES),
    "complex numbers": (with_complex, torch.float32, SITES),
    "a sparse parameter": (with_sparse, torch.float32, SITES),
    "float8": (with_float8, torch.float32, SITES),
    "a scripted child": (scripted_child, torch.float32, SITES - {"block.fused"}),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_of_such_tensors_is_converted_and_proven(name):
    make, dtype, sites = NETS[name]
    model, example = make(), (X.to(dtype),)
    kept = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    result = fuse(model, example)
    assert {site.path for site in result.plan.sites} == sites
    after = {key: tensor.dtype for key, tensor in result.module.state_dict().items()}
    assert all(kept[key] == after[key] for key in kept.keys() & after.keys())
    trials = input_variants(example)
    expected = reference(model, trials)
    proof = prove(model, result.plan, result.module, trials, expected)
    assert proof.passed, proof.reason
    assert drift(model, result.module, trials, expected).passed


def test_a_wrong_network_with_casts_is_told():
    model, example = bare(SoftmaxInFloat32, torch.bfloat16), (X.bfloat16(),)
    result = fuse(model, example)
    with torch.no_grad():
        result.module.stem[0].weight[0, 0, 0, 0] += 0.25
    trials = input_variants(example)
    assert not prove(model, result.plan, result.module, trials, reference(model, trials)).passed


def in_float64(forward, **members):
    (outcome,) = run_float64(Spelled(forward, **members).eval(), [Trial("x", (X.float(),))])
    assert not outcome.error, outcome.error
    return outcome.outputs["out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_of_data_are_left_out_in_float64(dtype):
    exact = X.float().double()
    assert torch.equal(in_float64(lambda m, x: x.to(dtype) * 3), exact * 3)
    assert torch.equal(in_float64(lambda m, x: F.softmax(x, 1, dtype=torch.float32)), F.softmax(exact, 1))
    assert torch.equal(in_float64(lambda m, x: x + torch.full((1,), 0.5, dtype=dtype)), exact + 0.5)


def test_casts_of_weights_stay():
    """A rounding of weights belongs to the network."""
    weight = nn.Parameter(torch.tensor([0.1]))
    exact = X.float().double()
    found = in_float64(lambda m, x: x * m.weight.half(), weight=weight)
    assert torch.equal(found, exact * weight.detach().half().double())


def test_integers_stay_integers_in_float64():
    assert torch.equal(in_float64(lambda m, x: (x * 0 + 7).long() // 2), torch.full(X.shape, 3))


def test_a_dynamically_quantised_part_is_left_alone():
    plain = bare(lambda: nn.Sequential(conv(), norm(), nn.Flatten(), nn.Linear(4 * 42, 8)))
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    result = fuse(model, (X.float(),))
    assert [site.path for site in result.plan.sites] == ["0"]
    assert torch.allclose(result.module(X.float()), model(X.float()), atol=0.05 * float(model(X.float()).abs().max()))
