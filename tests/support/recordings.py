"""What the tests of recordings share: the graph of a network, and what that really convolves with."""

from __future__ import annotations

import torch
from support.agreement import image
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repfuse.recording.arguments import Arguments
from repfuse.recording.recording import Recording, record


def parameter(*shape, **options):
    return nn.Parameter(image(*shape, **options))


def buffered(module, **tensors):
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def recorded(model, *inputs) -> Recording:
    return record(model, Arguments(inputs))


@torch.no_grad()
def run(found, *inputs):
    """What the graph computes, on the tensors of the model: what the graph writes, it writes there."""
    return fx.Interpreter(found.module, graph=found.graph).run(*(x.clone() for x in inputs))


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


def named(found, name) -> list[fx.Node]:
    """The nodes that call a function or a method of this name, in order."""
    return [node for node in found.nodes if function(node) == name]


def function(node) -> str:
    return str(node.target if isinstance(node.target, str) else node.target.__name__).partition(".")[0]
