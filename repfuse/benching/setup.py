"""The conditions of a measurement: eval mode, threads, batch sizes, and a clock that waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from repfuse.benching.clock import Clock
from repfuse.errors import RepfuseError
from repfuse.networks import same_randomness, set_eval
from repfuse.recording.copies import restored


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put the networks in eval mode, and leave them afterwards as they were: their modes, what they cached, what they
    counted in buffers, and the random numbers.
    """
    counted = [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]
    with ExitStack() as stack:
        stack.callback(_write_back, counted)
        for network in networks:
            stack.enter_context(same_randomness(network))
            stack.enter_context(restored(network))
            set_eval(network)
        yield


@torch.no_grad()
def _write_back(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, before in values:
        tensor.copy_(before)


def batch_of(inputs: tuple[Any, ...]) -> int | None:
    """Return the length of the first axis of the first tensor that has one."""
    return next((len(x) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.dim()), None)


def batched(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Return inputs of ``size`` samples: those given, repeated or cut off.

    Tensors whose first axis is as long as the batch follow; others stay.
    """
    batch = batch_of(inputs)
    return tuple(tree_map(lambda x: _repeat(x, batch, size), inputs)) if batch else inputs


def at_least(least: int, name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return the values, each once. Raises RepfuseError where there is none or one is less than ``least``."""
    if not values or min(values) < least:
        given = ", ".join(map(str, values)) or "empty"
        raise RepfuseError(f"{name} cannot be {given}.", "", f"Give at least {least}.")
    return tuple(dict.fromkeys(values))


def device_clock(clock: Clock, device: torch.device) -> Clock:
    """Return a clock that first waits until the device has finished what it was given."""
    if device.type != "cuda":
        return clock

    def wait_and_read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return wait_and_read


def _repeat(x: Any, old: int, size: int) -> Any:
    if not isinstance(x, torch.Tensor) or not x.dim() or len(x) != old:
        return x
    return x[torch.arange(size, device=x.device) % old]
