"""Whole networks with random weights and statistics that hide no mistake."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.samples import DigitsRepVGG

Network = TypeVar("Network", bound=nn.Module)


def digits(seed: int = 0) -> DigitsRepVGG:
    """Return the small network of the samples, in eval mode."""
    torch.default_generator.manual_seed(seed)
    return random_norms(DigitsRepVGG(width=4))


def random_norms(network: Network) -> Network:
    """Draw the numbers of all normalisations of a network, and return it in eval mode."""
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return network.eval()


def timm_network(name: str, **arguments: object) -> nn.Module:
    """Return timm's network without pretrained weights, in eval mode.

    Scales and shifts of the normalisations are random; their statistics are those of random images, so that the
    activations neither vanish nor grow over the depth of the network.
    """
    import timm

    torch.default_generator.manual_seed(0)
    network = timm.create_model(name, pretrained=False, **arguments)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 96, 96))
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()
