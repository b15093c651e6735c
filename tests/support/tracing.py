"""What the tests of the trace share: a graph without the planner, and what a model really convolves with."""

from __future__ import annotations

import torch
from support.agreement import image
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repfuse.tracing.skeleton import meta_copy
from repfuse.tracing.tracer import CallTracer


def parameter(*shape, **options):
    return nn.Parameter(image(*shape, **options))


def buffered(module, **tensors):
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def traced(model, leaves=()):
    tracer = CallTracer(frozenset(leaves), model)
    return tracer, tracer.trace(meta_copy(model))


@torch.no_grad()
def run(model, graph, x):
    return fx.Interpreter(model, graph=graph).run(x.clone())


class _Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[1].detach().clone())
        return func(*args, **(kwargs or {}))


def kernels(model, x):
    """The weights of the convolutions that one call of the model runs, in order."""
    with torch.no_grad(), _Kernels() as seen:
        model(x.clone())
    return seen.seen


def convolutions(graph):
    names = {"conv1d", "conv2d", "conv3d"}
    return [node for node in graph.nodes if str(getattr(node.target, "__name__", "")).partition(".")[0] in names]
