"""Timing calls in rounds. The clock is a parameter, so that the tests need not wait for one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from repfuse.errors import RepfuseError
from repfuse.networks import same_randomness, set_eval
from repfuse.recording.copies import restored

Clock = Callable[[], float]
Call = Callable[[], None]

SHORTEST = 5e-3  # seconds: one timing lasts at least this long, thousands of times the resolution of the clock
MOST_CALLS = 10_000
WARM_UP = 3
FEWEST_ROUNDS = 4  # two in each order


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of both networks, by round; ``calls`` the calls in a row of which each is the mean."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    calls: tuple[int, int]


def time_rounds(
    first: Call,
    second: Call,
    clock: Clock,
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[float], None],
) -> Rounds:
    """Time both calls, warm and interleaved: each round times both, every other round in reverse order (ABBA).

    So a drift of the machine's speed falls on both alike. Stops after ``rounds`` rounds, or after the first
    even number of rounds that fills ``seconds``, warm-up included, and no sooner than FEWEST_ROUNDS.
    """
    end = clock() + seconds
    calls = (_calibrate(first, clock), _calibrate(second, clock))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and number % 2 == 0 and clock() >= end:
            break
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times[which].append(time_calls((first, second)[which], calls[which], clock))
        progress((number + 1) / rounds)
    return Rounds(tuple(times[0]), tuple(times[1]), calls)


def time_calls(call: Call, calls: int, clock: Clock) -> float:
    """Return the mean seconds of ``calls`` calls in a row."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def _calibrate(call: Call, clock: Clock) -> int:
    """Warm up, and return how many calls in a row last SHORTEST, judged by the fastest of them."""
    once = min(time_calls(call, 1, clock) for _ in range(WARM_UP))
    return min(MOST_CALLS, math.ceil(SHORTEST / once)) if once > 0 else MOST_CALLS


# The conditions of a measurement: eval mode, threads, batch sizes, and a clock that waits for the device.


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
