"""A network in the runtimes that people deploy in: each as a call without arguments.

The inputs stay what they are, one shape for all calls; a runtime gets the network as its own tools make it: what
torch.compile compiles, what PyTorch's exporter writes. What nobody asked for is not imported.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repfuse.benching.clock import Call
from repfuse.benching.results import Runtime
from repfuse.checkpoint import onnx_file
from repfuse.errors import RepfuseError, quietly
from repfuse.networks import device_of
from repfuse.wording import described

Inputs = tuple[Any, ...]
Start = Callable[[nn.Module, Inputs, int, Path], Call]
"""Makes a network ready, with so many threads; files may be written into a folder that is there as long as the call."""


def eager(network: nn.Module, inputs: Inputs, _threads: int, _folder: Path) -> Call:
    """PyTorch, operator by operator."""
    return lambda: network(*inputs)


def compiled(network: nn.Module, inputs: Inputs, _threads: int, _folder: Path) -> Call:
    """``torch.compile``, of this shape alone."""
    with quietly():
        made = torch.compile(network, dynamic=False)

    return lambda: made(*inputs)


def onnxruntime(network: nn.Module, inputs: Inputs, threads: int, folder: Path) -> Call:
    """ONNX Runtime on the CPU, with all of its own optimisations."""
    session = onnx_file.session(str(_exported(network, inputs, folder)), threads)
    fed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, fed)


def openvino(network: nn.Module, inputs: Inputs, threads: int, folder: Path) -> Call:
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


def forget_compiled() -> None:
    """Drop what torch.compile made: after some shapes of one forward it compiles no more of them, without a word."""
    torch._dynamo.reset()


def started(name: str, network: nn.Module, inputs: Inputs, threads: int, folder: Path) -> Call:
    """Return what calls the network once in a runtime. Raises RepfuseError where that is not there, or refuses it."""
    start, needed, extra = RUNTIMES[name]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        what = f"{', '.join(missing)} not installed"
        raise RepfuseError(f"{what}: pip install 'repfuse[{extra}]'")
    try:
        call = start(network, inputs, threads, folder)
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
    pairs = [[torch.as_tensor(x).double() for x in _arrays(value)] for value in (wanted, found)]
    if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
        return False
    return all(bool(((x - y).abs() <= ROUGHLY * x.abs().max()).all()) for x, y in zip(*pairs, strict=True) if x.numel())


ROUGHLY = 0.05
"""Of the largest number of an output."""


def _arrays(value: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor | np.ndarray)]
