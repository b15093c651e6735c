"""Two networks timed against each other in one process."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from repfuse.benching.results import Benchmark, ColdCalls, Experiment, Measurement, NetworkCost, Runtime, Timing
from repfuse.benching.timing import (
    FEWEST_ROUNDS,
    Clock,
    TimedCall,
    at_least,
    batched,
    device_clock,
    evaluating,
    judge,
    ratio_of_medians,
    time_calls,
    time_rounds,
)
from repfuse.checking.inputs import Example, Trial
from repfuse.checkpoint import onnx_file
from repfuse.errors import RepfuseError, failing_as, quietly
from repfuse.networks import (
    as_inputs,
    between,
    check_runnable,
    device_of,
    main_dtype,
    placed,
    tensors_of,
    using_threads,
    why_refused,
)
from repfuse.recording.copies import changed_copy
from repfuse.recording.read_only import OperatorMode
from repfuse.wording import Progress, described, dtype_name

# What a network stores and computes.


class _Counting(OperatorMode):  # type: ignore[no-untyped-call]
    """Adds up floating point operations as PyTorch's FlopCounterMode does, which would load the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, formula = kwargs or {}, flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:  # one that is made of others comes whole in inference mode
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.operations += int(formula(*args, **kwargs, out_val=result))
        return result


@torch.inference_mode()
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


# A network in the runtimes that people deploy in: each as a call without arguments. The inputs stay what they are, one
# shape for all calls; a runtime gets the network as its own tools make it: what torch.compile compiles, what PyTorch's
# exporter writes. What nobody asked for is not imported.

Inputs = tuple[Any, ...]
Start = Callable[[nn.Module, Inputs, int, Path], TimedCall]
"""Makes a network ready, with so many threads; files may be written into a folder that is there as long as the call."""


def eager(network: nn.Module, inputs: Inputs, _threads: int, _folder: Path) -> TimedCall:
    """PyTorch, operator by operator."""
    return lambda: network(*inputs)


def compiled(network: nn.Module, inputs: Inputs, _threads: int, _folder: Path) -> TimedCall:
    """``torch.compile``, of this shape alone."""
    with quietly():
        made = torch.compile(network, dynamic=False)
    return lambda: made(*inputs)


def onnxruntime(network: nn.Module, inputs: Inputs, threads: int, folder: Path) -> TimedCall:
    """ONNX Runtime on the CPU, with all of its own optimisations."""
    session = onnx_file.session(str(_exported(network, inputs, folder)), threads)
    fed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, fed)


def openvino(network: nn.Module, inputs: Inputs, threads: int, folder: Path) -> TimedCall:
    """OpenVINO on the CPU, in float32: of itself it would compute in bfloat16 where the processor can."""
    path = _exported(network, inputs, folder)
    runtime = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = runtime.compile_model(str(path), "CPU", settings).create_infer_request()
    fed = {place: x.numpy() for place, x in enumerate(inputs)}
    return lambda: list(request.infer(fed).values())


def _exported(network: nn.Module, inputs: Inputs, folder: Path) -> Path:
    """Return the network as an ONNX file for inputs of these shapes, written where no runtime had it written before."""
    if isinstance(network, onnx_file.OfFile):
        return network.path
    if not all(isinstance(x, Tensor) for x in inputs):
        raise RepfuseError("It takes tensors alone as inputs.")
    if device_of(network).type != "cpu":
        raise RepfuseError("It is timed on the CPU, and the network is elsewhere.")
    path = folder / f"{id(network)}.onnx"
    if not path.exists():
        with quietly(), torch.no_grad():
            program = torch.export.export(network, inputs)
        onnx_file.write(program, path)
    return path


RUNTIMES: dict[str, tuple[Start, Sequence[str], str]] = {
    Runtime.EAGER: (eager, (), ""),
    Runtime.COMPILE: (compiled, (), ""),
    Runtime.ONNXRUNTIME: (onnxruntime, onnx_file.NEEDED, "onnx"),
    Runtime.OPENVINO: (openvino, ("openvino", *onnx_file.NEEDED), "openvino"),
}
"""For each runtime what starts it, the packages that it needs, and the extra that brings them."""


def started(name: str, network: nn.Module, inputs: Inputs, threads: int, folder: Path) -> TimedCall:
    """Return what calls the network once in a runtime. Raises RepfuseError where that is not there, or refuses it."""
    start, needed, extra = RUNTIMES[name]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        what = f"{', '.join(missing)} not installed"
        raise RepfuseError(f"{what}: pip install 'repfuse[{extra}]'")
    try:
        call = start(network, inputs, threads, folder)
        if name == Runtime.EAGER:  # which is the network itself
            return call
        with quietly():
            alike = _alike(network(*inputs), call())
    except RepfuseError:
        raise
    except Exception as error:  # each raises what it likes
        raise RepfuseError(described(error)) from error
    if not alike:
        raise RepfuseError("what it made of the network computes something else")
    return call


def _alike(wanted: Any, found: Any) -> bool:
    """Whether a runtime computes what the network does, roughly: a drift of kernels is none, another branch is one."""
    arrays = ((x for x in tree_leaves(value) if isinstance(x, Tensor | np.ndarray)) for value in (wanted, found))
    pairs = [[torch.as_tensor(x).double() for x in each] for each in arrays]
    if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
        return False
    return all(bool(((x - y).abs() <= ROUGHLY * x.abs().max()).all()) for x, y in zip(*pairs, strict=True) if x.numel())


ROUGHLY = 0.05
"""Of the largest number of an output."""


def bench(
    original: nn.Module,
    fused: nn.Module,
    example_inputs: Sequence[Any] | Tensor,
    *,
    more_inputs: Sequence[Sequence[Any]] = (),
    runtimes: Sequence[str] = (Runtime.EAGER,),
    batch_sizes: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    rounds: int = 40,
    seconds: float = 10.0,
    cold: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    channels_last: bool = False,
    progress: Progress = lambda _stage, _fraction: None,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Time both networks, warm and interleaved, in each runtime on all inputs at every batch size and thread count.

    Both run in eval and inference mode, each on the device and in the dtype it has, or copies of both in ``dtype``, on
    ``device``, with images and kernels ``channels_last``; the inputs follow. ``runtimes`` are of RUNTIMES; one that is
    not installed or refuses a network is left out, which the result says. ``more_inputs`` are examples of other sizes.
    Without ``batch_sizes`` and ``threads`` the example's batch and torch's present thread count are measured. Each
    setting takes ``rounds`` rounds, fewer where they fill ``seconds``. On CUDA the time is that between events on the
    device, before the first and after the last of the calls in a row that make one timing. ``cold`` adds one cold call
    of each, before all else. ``progress`` is called with a stage and the fraction done; ``clock`` gives seconds.

    Raises RepfuseError where a network cannot run on the inputs, a number makes no sense or no runtime is left.
    """
    for network in (original, fused):
        check_runnable(network)
    at_least(FEWEST_ROUNDS, "The number of rounds", [rounds])
    original, fused = (_changed(network, dtype, device, channels_last) for network in (original, fused))
    counts = at_least(1, "The number of threads", [torch.get_num_threads()] if threads is None else threads)
    settings = list[tuple[Pair, int, int]]()
    for inputs in (as_inputs(example_inputs), *more_inputs):
        example = tuple(map(_channels_last, inputs)) if channels_last else tuple(inputs)
        floats = {x.dtype for x in tensors_of(example) if x.is_floating_point()}
        cast = dict.fromkeys(floats, dtype) if dtype else {}
        sizes = at_least(1, "The batch size", [Example(example).batch or 1] if batch_sizes is None else batch_sizes)
        first = Contestant(original, placed(example, device_of(original), cast))
        second = Contestant(fused, placed(example, device_of(fused), cast or between(original, fused)))
        settings += product([(first, second)], sizes, counts)
    before, after = settings[0][0]
    clock = device_clock(device_clock(clock, device_of(original)), device_of(fused))
    measurements: list[Measurement] = []
    left_out, setting = dict[str, str](), dict[str, Any]()
    with evaluating(original, fused):
        once = ColdCalls(before.time_once(clock), after.time_once(clock)) if cold else None
        product_of, macs = _matrix_product(original)
        for done, (both, size, count) in enumerate(settings):

            def report(fraction: float, name: str = f"batch {size}, threads {count}", done: int = done) -> None:
                progress(name, (done + fraction) / len(settings))

            pair = (both[0].at(size), both[1].at(size))
            grown = size / (Example(both[0].inputs).batch or size)
            work = [None if each.cost.macs is None else each.cost.macs * grown / macs for each in both]
            shapes = Trial("", pair[0].inputs).shapes if more_inputs else ()
            setting = {"rounds": rounds, "seconds": seconds, "batch_size": size, "threads": count, "shapes": shapes}
            with using_threads(count), TemporaryDirectory() as folder:
                for each, known in zip(pair, both, strict=True):
                    if each is not known or known.cost.macs is None:  # else it ran to be counted
                        each.time_once(time.perf_counter)
                calls = _start(pair, [name for name in runtimes if name not in left_out], Path(folder), left_out)
                measurements += _measure(calls, work, product_of, clock, report, **setting)
                if "compile" in calls:  # after some shapes of one forward it compiles no more of them, without a word
                    torch._dynamo.reset()
    return Benchmark(
        device=str(device_of(fused)),
        dtype=" and ".join(dict.fromkeys(dtype_name(main_dtype(each)) for each in (original, fused))),
        shapes=Trial("", before.inputs).shapes,
        before=before.cost,
        after=after.cost,
        measurements=tuple(measurements),
        cold=once,
        left_out=tuple(f"{name}: {why}" for name, why in left_out.items()),
    )


def _changed(
    network: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None, channels_last: bool
) -> nn.Module:
    """Return the network, or a copy of it that is as it was asked for."""
    if dtype is None and device is None and not channels_last:
        return network

    def changed(_name: str, x: Tensor) -> Tensor:
        x = x.detach().to(device=device, dtype=dtype if x.is_floating_point() else None)
        return _channels_last(x) if channels_last else x

    kinds = RuntimeError, AssertionError  # torch raises either where there is no such device
    with failing_as(f"The network cannot be put on {device}.", "Leave --device out.", of=kinds):
        return changed_copy(network, changed)


def _channels_last(x: Any) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    known = isinstance(x, Tensor) and x.dim() in formats
    return x.contiguous(memory_format=formats[x.dim()]) if known else x


@dataclass(frozen=True, eq=False)
class Contestant:
    """A network and the inputs of a call."""

    network: nn.Module
    inputs: Inputs

    @cached_property
    def cost(self) -> NetworkCost:
        """The network's weights, and its work in one call."""
        parameters = list(self.network.parameters())
        weight_bytes = sum(x.numel() * x.element_size() for x in (*parameters, *self.network.buffers()))
        macs, peak = _macs(self.network, self.inputs), _peak(self.network, self.inputs, weight_bytes)
        return NetworkCost(sum(x.numel() for x in parameters), weight_bytes, macs, peak)

    def at(self, size: int) -> Contestant:
        """Return the same network with a batch of ``size``."""
        if Example(self.inputs).batch in (size, None):
            return self
        return Contestant(self.network, batched(self.inputs, size))

    @torch.inference_mode()
    def time_once(self, clock: Clock) -> float:
        """Return the seconds of one call. Raises RepfuseError where the network cannot run."""
        start = clock()
        try:
            self.network(*self.inputs)
        except Exception as error:
            why, hint = why_refused(self.network, self.inputs, described(error))
            name = type(self.network).__name__
            raise RepfuseError(
                f"The network {name} cannot run on the inputs.", why, f"{hint} Or give another batch size."
            ) from error
        return clock() - start


Pair = tuple[Contestant, Contestant]


@torch.inference_mode()
def _start(pair: Pair, runtimes: Sequence[str], folder: Path, left_out: dict[str, str]) -> dict[str, list[TimedCall]]:
    """Return a call of both networks for each runtime that takes both; note for the others why they do not."""
    found: dict[str, list[TimedCall]] = {}
    threads = torch.get_num_threads()
    for name in runtimes:
        try:
            made = [started(name, each.network, each.inputs, threads, folder) for each in pair]
        except RepfuseError as error:
            left_out[name] = error.what
        else:
            found[name] = made
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise RepfuseError("There is nothing to time.", reasons, "Leave --runtime out to time PyTorch's eager mode.")
    return found


@torch.inference_mode()
def _measure(
    calls: Mapping[str, Sequence[TimedCall]],
    work: Sequence[float | None],
    product_of: TimedCall,
    clock: Clock,
    report: Callable[[float], None],
    *,
    rounds: int,
    seconds: float,
    **setting: Any,
) -> Iterator[Measurement]:
    """Time all calls and a matrix product in the same rounds; yield what they say of each runtime.

    ``work`` are the multiply-accumulates of both networks, in those of the product; ``setting`` is for ``judge``.
    """
    every = [*(call for both in calls.values() for call in both), product_of]
    found = time_rounds(every, clock, rounds=rounds, seconds=seconds, progress=report)
    once = statistics.median(found.times[-1])
    floors = [None if amount is None else amount * once for amount in work]
    pairs = zip(found.times[:-1], found.calls[:-1], floors * len(calls), strict=True)
    timings = iter([Timing.of(*each) for each in pairs])
    whole: Timing | None = None
    for runtime in calls:
        first, second = next(timings), next(timings)
        whole = first if runtime == Runtime.EAGER else whole
        over = None if whole is None or whole is first else ratio_of_medians(whole.times, second.times)
        yield judge(first, second, rounds=rounds, runtime=runtime, over_eager=over, **setting)


SIDES = {"cpu": 512, "cuda": 4096}
"""Of a matrix product that a processor does about as fast as it can."""


def _matrix_product(network: nn.Module) -> tuple[TimedCall, float]:
    """Return a plain product of square matrices on the network's device in its dtype, and its multiply-accumulates."""
    device, side = device_of(network), SIDES.get(device_of(network).type, 512)
    one = torch.ones(side, side, device=device, dtype=main_dtype(network) or torch.float32)
    return partial(torch.mm, one, one), float(side**3)


# The experiment that this project began with, as it was done there and as it should be. A notebook fused
# ``conv3(x) + conv1(x) + x`` with ``padding="same"``, called the block and the one convolution once each, cold, the
# block first, and claimed a factor of 10.7.

NOTEBOOK_SHAPES = ((2, 28, 28), (16, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))


@torch.inference_mode()
def experiments(
    *,
    rounds: int = 40,
    seconds: float = 3.0,
    progress: Progress = lambda _stage, _fraction: None,
    clock: Clock = time.perf_counter,
) -> tuple[Experiment, ...]:
    """Do it at each of NOTEBOOK_SHAPES, which takes ``seconds`` or ``rounds`` rounds."""
    from repfuse.fusing import fuse  # which no other benchmark needs
    from repfuse.samples import NotebookBlock

    found = []
    for number, shape in enumerate(NOTEBOOK_SHAPES):
        progress("the notebook's experiment", number / len(NOTEBOOK_SHAPES))
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        block = NotebookBlock(shape[0]).eval()
        first = time_calls(partial(block, x), 1, clock)
        fused = fuse(block, (x,)).module
        second = time_calls(partial(fused, x), 1, clock)
        integers = copy.deepcopy(block)
        integers.conv3.padding, integers.conv1.padding = (1, 1), (0, 0)
        calls = [partial(network, x) for network in (block, integers, fused)]
        times = time_rounds(calls, clock, rounds=rounds, seconds=seconds, progress=lambda _fraction: None).times
        warm, again = (ratio_of_medians(each, times[2]) for each in times[:2])
        found.append(Experiment((1, *shape), first / second, warm, again))
    return tuple(found)
