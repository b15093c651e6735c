"""The trace as the planner gets it: constants, a fingerprint that repeats, and writes that nobody may miss."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import Spelled, conv
from support.agreement import error, image, operations, randomised
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from repfuse.fusing import fuse
from repfuse.planning.cost import Policy
from repfuse.planning.hazards import Hazards
from repfuse.tracing.arguments import Arguments
from repfuse.tracing.trace import trace

X = image(2, 4, 5, 6)


def computed():
    def forward(m, x):
        kernel = torch.zeros_like(m.w)
        kernel[:2] = m.w[:2] * float(m.scale)
        return m.a(x) + F.conv2d(x, kernel, padding=1)

    model = Spelled(forward, a=parametrizations.weight_norm(conv(3)), w=nn.Parameter(torch.ones(4, 4, 3, 3)))
    model.register_buffer("scale", torch.tensor(2.0))
    return model.double().eval()


def test_a_trace_knows_its_constants_with_the_shapes_of_the_real_tensors():
    model = computed()
    found = trace(model, Arguments((X,)))
    weights = [node.args[1] for node in found.nodes if getattr(node.target, "__name__", "") == "conv2d"]
    names = [found.constants.name_of(weight) for weight in weights]
    assert [found.constants.shape(name) for name in names] == [(4, 4, 3, 3)] * 2
    assert found.constants.module is model and all(tensor.is_meta for tensor in found.module.parameters())


def test_the_fingerprint_is_that_of_the_architecture():
    model = computed()
    first = trace(model, Arguments((X,))).fingerprint()
    assert trace(model, Arguments((X,))).fingerprint() == first
    scale = model.scale.clone()
    randomised(model)
    assert trace(model, Arguments((X,))).fingerprint() == first
    model.scale.copy_(scale + 1)  # a number that forward asked for is part of the graph
    assert trace(model, Arguments((X,))).fingerprint() != first


WRITES = {
    "slice": lambda s: s.__setitem__(0, 1.0),
    "slice of a view": lambda s: s[0].__setitem__(1, 1.0),
    "slice of a kept view": lambda s: s[:, :1].__setitem__(slice(None), 0),
    "data": lambda s: s.data.__setitem__(..., 1.0),
    "out=": lambda s: torch.sin(s, out=s),
    "aten": lambda s: torch.ops.aten.slice.Tensor(s, 1, 0, 1).fill_(0),
}


@pytest.mark.parametrize("name", WRITES)
def test_hazards_see_writes_through_views(name):
    def forward(m, x):
        source = torch.sin(x)
        first = m.a(source)
        WRITES[name](source)
        return first + torch.cos(source)

    found = trace(Spelled(forward, a=conv(1)).double(), Arguments((X,)))
    hazards = Hazards(found, {})
    sin, first, last = (next(n for n in found.nodes if n.name == name) for name in ("sin", "a", "cos"))
    assert hazards.written_between(sin, first, last) and not hazards.written_between(sin, sin, first)
    writer = found.nodes[found.order[last] - 1]
    assert hazards.seen_later(writer) == (name != "slice")  # whose result is what the name stands for from then on


class Counting(nn.Module):
    """Counts its calls, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x):
        self.calls[0:1].add_(1)
        return x


@pytest.mark.parametrize("make", [Counting, FakeQuantize])
def test_recording_shapes_changes_no_state_of_the_model(make):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), make()).eval()
    before = copy.deepcopy(model.state_dict())
    trace(model, Arguments((torch.randn(1, 4, 6, 7),)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Pieces(nn.Module):
    """A convolution for each piece of the channels, in a loop."""

    def __init__(self, take):
        super().__init__()
        self.take = take
        self.convs = nn.ModuleList(conv(3, inputs=2, outputs=2) for _ in range(2))

    def forward(self, x):
        return torch.cat([part(piece) for piece, part in zip(self.take(x), self.convs, strict=False)], 1)


LOOPS = [
    lambda x: x.chunk(2, 1),
    lambda x: torch.chunk(x, chunks=2, dim=1),
    lambda x: x.split([2, 2], 1),
    lambda x: torch.split(x, (2, 2), dim=1),
    lambda x: x.tensor_split(2, dim=1),
    lambda x: torch.split_with_sizes(x, [2, 2], 1),
]


@pytest.mark.parametrize("take", LOOPS)
def test_a_loop_over_pieces_is_followed(take):
    model = randomised(Pieces(take))
    result = fuse(model, (X,), Policy.ALWAYS)
    assert operations(result.module, X)["convolution"] == 1
    assert error(model, result.module, X) < 1e-12


OTHERS = [  # a loop, and the channels of its pieces: of 5 channels, chunk(4) makes 3 pieces
    (lambda x: x.chunk(4, 1), (2, 2, 1)),
    (lambda x: x.split(3, 1), (3, 2)),
    (lambda x: x.chunk(2, 3), (5, 5)),
]


@pytest.mark.parametrize(("take", "sizes"), OTHERS)
def test_a_loop_over_pieces_of_a_number_that_no_call_says_is_not(take, sizes):
    inner = Pieces(take)
    inner.convs = nn.ModuleList(nn.Conv2d(size, 2, 1) for size in sizes)
    model = randomised(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), inner))
    result = fuse(model, (X,))
    assert [refusal.code for refusal in result.plan.refusals] == ["untraceable"]
    assert len(result.plan.sites) == 1 and error(model, result.module, X) < 1e-12
