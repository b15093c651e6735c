"""Two networks timed against each other in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from repfuse.benching.clock import FEWEST_ROUNDS, Clock, time_rounds
from repfuse.benching.costs import network_cost
from repfuse.benching.judgement import judge
from repfuse.benching.results import Benchmark, ColdCalls, Measurement
from repfuse.benching.setup import at_least, batch_of, batched, device_clock, evaluating
from repfuse.errors import RepfuseError
from repfuse.networks import between, device_of, main_dtype, placed, using_threads
from repfuse.preconditions import check_runnable
from repfuse.progress import Progress

Inputs = tuple[Any, ...]


def bench(
    original: nn.Module,
    fused: nn.Module,
    example_inputs: Sequence[Any],
    *,
    batch_sizes: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    rounds: int = 40,
    seconds: float = 10.0,
    cold: bool = False,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Time both networks, warm and interleaved, at every batch size and thread count.

    Both run in eval and inference mode, each on the device and in the dtype it has; the inputs follow.
    Without ``batch_sizes`` and ``threads`` the example's batch and torch's present thread count are measured.
    Each pair of them takes ``rounds`` rounds, fewer where they fill ``seconds``. On CUDA the clock waits for
    the device before the first and after the last of the calls in a row that make one timing. ``cold`` adds
    one cold call of each, before all else. ``progress`` is called with a stage and the fraction done;
    ``clock`` gives seconds.

    Raises RepfuseError where a network cannot run on the inputs or a number makes no sense.
    """
    for network in (original, fused):
        check_runnable(network)
    at_least(FEWEST_ROUNDS, "The number of rounds", [rounds])
    example = tuple(example_inputs)
    sizes = at_least(1, "The batch size", [batch_of(example) or 1] if batch_sizes is None else batch_sizes)
    counts = at_least(1, "The number of threads", [torch.get_num_threads()] if threads is None else threads)
    first = Contestant(original, placed(example, device_of(original), {}))
    second = Contestant(fused, placed(example, device_of(fused), between(original, fused)))
    clock = device_clock(device_clock(clock, device_of(original)), device_of(fused))
    settings = list(product(sizes, counts))
    measurements = []
    with evaluating(original, fused):
        once = ColdCalls(first.time_once(clock), second.time_once(clock)) if cold else None
        for done, (size, count) in enumerate(settings):
            report = _stage(progress, f"batch {size}, threads {count}", done, len(settings))
            pair = (first.at(size), second.at(size))
            with using_threads(count):
                measured = _measure(pair, clock, report, size=size, rounds=rounds, seconds=seconds)
            measurements.append(measured)
        costs = [network_cost(each.network, each.inputs) for each in (first, second)]
    shapes = tuple(tuple(x.shape) for x in tree_leaves(example) if isinstance(x, torch.Tensor))
    return Benchmark(
        device=str(device_of(fused)),
        dtype=_dtypes(original, fused),
        shapes=shapes,
        before=costs[0],
        after=costs[1],
        measurements=tuple(measurements),
        cold=once,
    )


@dataclass(frozen=True)
class Contestant:
    """A network and the inputs of a call."""

    network: nn.Module
    inputs: Inputs

    def at(self, size: int) -> Contestant:
        """Return the same network with a batch of ``size``."""
        if batch_of(self.inputs) in (size, None):
            return self
        return Contestant(self.network, batched(self.inputs, size))

    def call(self) -> None:
        """Call the network."""
        self.network(*self.inputs)

    @torch.inference_mode()
    def time_once(self, clock: Clock) -> float:
        """Return the seconds of one call. Raises RepfuseError where the network cannot run."""
        start = clock()
        try:
            self.call()
        except Exception as error:
            raise RepfuseError(
                f"The network {type(self.network).__name__} cannot run on the inputs.",
                f"{type(error).__name__}: {error}.",
                "Give an input of the shape and dtype that the network takes, or another batch size.",
            ) from error
        return clock() - start


@torch.inference_mode()
def _measure(
    pair: tuple[Contestant, Contestant],
    clock: Clock,
    report: Callable[[float], None],
    *,
    size: int,
    rounds: int,
    seconds: float,
) -> Measurement:
    for each in pair:
        each.time_once(clock)  # whether it runs at all
    calls = (pair[0].call, pair[1].call)
    times = time_rounds(*calls, clock, rounds=rounds, seconds=seconds, progress=report)
    return judge(times, batch_size=size, threads=torch.get_num_threads(), rounds=rounds)


def _stage(progress: Progress | None, name: str, done: int, of: int) -> Callable[[float], None]:
    if progress is None:
        return lambda _fraction: None
    return lambda fraction: progress(name, (done + fraction) / of)


def _dtypes(original: nn.Module, fused: nn.Module) -> str:
    names = dict.fromkeys(str(main_dtype(network)).removeprefix("torch.") for network in (original, fused))
    return " and ".join(names)
