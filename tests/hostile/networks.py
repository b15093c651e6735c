"""Networks whose attributes are not what their classes would have set."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from repfuse.samples import DigitsRepVGG, NotebookBlock

from .attack import Attack


def saved(change: Callable[[nn.Module], Any], kind: Callable[[], nn.Module] = NotebookBlock) -> Attack:
    def make(_folder: Any, _canary: Any) -> bytes:
        network = kind()
        change(network)
        buffer = io.BytesIO()
        torch.save(network, buffer)
        return buffer.getvalue()

    return Attack(make, may_load=True)


def shape(*sizes: Any) -> Callable[[nn.Module], None]:
    return lambda network: vars(network).update(input_shape=sizes)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3))


def attribute(name: str, value: Any) -> Callable[[nn.Module], None]:
    """Set it behind the back of nn.Module, whose checks a file goes around."""
    return lambda network: (network[0]._parameters if name == "weight" else vars(network[0])).update({name: value})


NETWORKS = {
    "an input of terabytes": saved(shape(1, 1, 1_000_000, 1_000_000), DigitsRepVGG),
    "an input of 2**60": saved(shape(1, 1, 1 << 60, 8), DigitsRepVGG),
    "an input of 2**90": saved(shape(1, 1, 1 << 30, 1 << 60), DigitsRepVGG),
    "an input of less than nothing": saved(shape(1, -1, 8, 8), DigitsRepVGG),
    "an input of text": saved(shape("1", "os.system"), DigitsRepVGG),
    "an input of fractions": saved(shape(1.5, 1, 8, 8), DigitsRepVGG),
    "an input of nothing": saved(shape(), DigitsRepVGG),
    "an input that is None": saved(lambda network: vars(network).update(input_shape=None), DigitsRepVGG),
    "a convolution of a billion channels": saved(attribute("in_channels", 10**9), plain),
    "a convolution of text": saved(attribute("in_channels", "os"), plain),
    "a convolution of no axes": saved(attribute("kernel_size", ()), plain),
    "a convolution without a weight": saved(attribute("weight", None), plain),
    "a convolution of a weight of nine axes": saved(attribute("weight", nn.Parameter(torch.zeros((1,) * 9))), plain),
    "a kernel of no axes": saved(lambda network: setattr(network.conv3, "kernel_size", ())),
    "a kernel of nine axes": saved(lambda network: setattr(network.conv3, "kernel_size", (1,) * 9)),
    "a kernel of a number": saved(lambda network: setattr(network.conv3, "kernel_size", 3)),
    "training that is text": saved(lambda network: setattr(network, "training", "x")),
    "no modules": saved(lambda network: network._modules.clear()),
    "modules that are None": saved(lambda network: network._modules.update(dict.fromkeys(network._modules))),
    "a weight of nothing": saved(lambda network: setattr(network.conv3, "weight", nn.Parameter(torch.zeros(0)))),
}
