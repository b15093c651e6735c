"""What a network stores and computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repfuse.benching.results import NetworkCost
from repfuse.networks import device_of


def network_cost(network: nn.Module, inputs: tuple[Any, ...]) -> NetworkCost:
    """Count the network's weights, and its work in one call on ``inputs``."""
    parameters = list(network.parameters())
    weight_bytes = sum(x.numel() * x.element_size() for x in (*parameters, *network.buffers()))
    return NetworkCost(
        parameters=sum(x.numel() for x in parameters),
        weight_bytes=weight_bytes,
        macs=_macs(network, inputs),
        peak_bytes=_peak(network, inputs, weight_bytes),
    )


@torch.no_grad()
def _macs(network: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    try:
        with FlopCounterMode(display=False) as counter:
            network(*inputs)
    except Exception:  # the network runs, so it is the counter that cannot follow it: scripted, compiled, ...
        return None
    return int(counter.get_total_flops()) // 2


@torch.no_grad()
def _peak(network: nn.Module, inputs: tuple[Any, ...], weight_bytes: int) -> int | None:
    """Return the weights and what a call allocates at its peak; the other network's weights do not count."""
    device = device_of(network)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    network(*inputs)
    return weight_bytes + torch.cuda.max_memory_allocated(device) - before
