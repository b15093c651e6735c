"""Two networks timed against each other in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from repfuse.benching.clock import (
    FEWEST_ROUNDS,
    SHORTEST,
    Clock,
    Rounds,
    at_least,
    batch_of,
    batched,
    device_clock,
    evaluating,
    time_rounds,
)
from repfuse.benching.results import Benchmark, ColdCalls, Measurement, NetworkCost, Timing
from repfuse.benching.statistics import outliers, ratio_of_medians
from repfuse.checkpoint.onnx_file import InRuntime
from repfuse.errors import RepfuseError
from repfuse.networks import between, device_of, main_dtype, placed, using_threads, why_refused
from repfuse.preconditions import check_runnable
from repfuse.progress import Progress
from repfuse.recording.read_only import OperatorMode
from repfuse.wording import described

# What a network stores and computes.


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


class _Counting(OperatorMode):  # type: ignore[no-untyped-call]
    """Adds up floating point operations as PyTorch's FlopCounterMode does, which would load the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.operations += int(formula(*args, **kwargs, out_val=result))
        return result


@torch.no_grad()
def _macs(network: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    counter = _Counting()
    try:
        with counter:
            network(*inputs)
    except Exception:  # the network runs, so it is the counter that cannot follow it: scripted, compiled, ...
        return None
    return counter.operations // 2


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


# What the times of a measurement say, and what to be wary of.


OVERHEAD = 50e-6  # seconds: a call this short is mostly Python's and torch's own bookkeeping


def judge(times: Rounds, *, batch_size: int, threads: int, rounds: int) -> Measurement:
    """Return medians, the speed-up with its interval, and warnings; ``rounds`` is the number asked for."""
    ratio = ratio_of_medians(times.first, times.second)
    original, fused = _timing(times.first, times.calls[0]), _timing(times.second, times.calls[1])
    return Measurement(
        batch_size=batch_size,
        threads=threads,
        original=original,
        fused=fused,
        speedup=ratio.value,
        low=ratio.low,
        high=ratio.high,
        warnings=(
            *_warnings("original", original),
            *_warnings("fused network", fused),
            *_too_few(len(times.first), rounds),
        ),
    )


def _timing(times: tuple[float, ...], calls: int) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), calls, times)


def _warnings(name: str, timing: Timing) -> Iterator[str]:
    if timing.median < OVERHEAD:
        yield (
            f"A call of the {name} takes less than {OVERHEAD * 1e6:.0f} microseconds, mostly the overhead of "
            "calling it: use a larger input or batch."
        )
    if timing.median * timing.calls < SHORTEST / 2:
        yield f"The timings of the {name} are too short for the clock: use a larger input or batch."
    found = outliers(timing.times)
    if found and timing.times[0] == timing.slowest:
        yield f"The first timing of the {name} was much slower than the others: it was not warm yet."
    elif found:
        yield (
            f"{found} of {len(timing.times)} timings of the {name} are outliers, so something else was running: "
            "repeat this on a quiet machine."
        )


def _too_few(done: int, rounds: int) -> Iterator[str]:
    if done < min(rounds, 2 * FEWEST_ROUNDS):
        yield f"Only {done} of {rounds} rounds fitted in the time: allow more for a narrower interval."


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
        costs = [network_cost(_counted(each.network), each.inputs) for each in (first, second)]
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
            why, hint = why_refused(self.network, self.inputs, described(error))
            name = type(self.network).__name__
            raise RepfuseError(
                f"The network {name} cannot run on the inputs.", why, f"{hint} Or give another batch size."
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


def _counted(network: nn.Module) -> nn.Module:
    """Return the network whose operations can be counted."""
    return network.network if isinstance(network, InRuntime) else network


def _stage(progress: Progress | None, name: str, done: int, of: int) -> Callable[[float], None]:
    if progress is None:
        return lambda _fraction: None
    return lambda fraction: progress(name, (done + fraction) / of)


def _dtypes(original: nn.Module, fused: nn.Module) -> str:
    names = dict.fromkeys(str(main_dtype(network)).removeprefix("torch.") for network in (original, fused))
    return " and ".join(names)
