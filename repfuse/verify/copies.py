"""Copies of a network in another precision, and runs that leave nothing behind.

The network that is handed in is never called and never changed: some networks cache what they compute, and
the copy carries that away with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.verify.inputs import Trial
from repfuse.verify.outputs import leaves

Change = Callable[[str, torch.Tensor], torch.Tensor]
SEED = 0  # of networks that draw random numbers: both draw the same


@dataclass(frozen=True)
class Outcome:
    """What one call gave: its output tensors by name (on the CPU), or else why it failed."""

    outputs: dict[str, torch.Tensor]
    error: str = ""


def in_float64(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Widen a floating tensor, exactly; leave integers, booleans and complex numbers."""
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def as_stored(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor as it is."""
    return tensor.clone()


def named_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter, buffer and plain tensor attribute of the modules, once, by its dotted name."""
    seen: set[int] = set()
    for path, module in network.named_modules():
        members = {**vars(module), **module._buffers, **module._parameters}
        for name, value in members.items():
            if isinstance(value, torch.Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield f"{path}.{name}" if path else name, value


def copy_with(network: nn.Module, change: Change) -> nn.Module:
    """Return a copy in eval mode whose tensors are ``change(name, tensor)``; tensors that were shared stay
    so.

    Raises RepfuseError where the network cannot be copied.
    """
    # deepcopy takes what is in its memo: no second copy of the weights, and a tensor's history is no obstacle.
    memo = {id(tensor): _like(tensor, change(name, tensor.detach())) for name, tensor in named_tensors(network)}
    try:
        return copy.deepcopy(network, memo).eval()
    except Exception as error:
        raise RepfuseError(
            f"The network {type(network).__name__} cannot be copied.",
            f"{type(error).__name__}: {error}. Networks are compared on copies, so that yours stay as is.",
            "Remove what cannot be copied (open files, locks, generators) from its attributes.",
        ) from error


def run(network: nn.Module, trials: Iterable[Trial], cast: Mapping[torch.dtype, torch.dtype]) -> list[Outcome]:
    """Call the network on each trial, its floating inputs cast as ``cast`` says (dtypes not named stay).

    The network must be one of our copies: the call may change it.
    """
    device = _device(network)
    return [call(network, tuple(_place(x, device, cast) for x in trial.inputs)) for trial in trials]


def run_float64(network: nn.Module, trials: Sequence[Trial]) -> list[Outcome]:
    """Call a network that ``copy_with`` has widened to float64 on each trial, inputs widened too."""
    dtypes = {x.dtype for trial in trials for x in trial.inputs if _floating(x)}
    return run(network, trials, dict.fromkeys(dtypes, torch.float64))


def main_dtype(network: nn.Module) -> torch.dtype | None:
    """Return the floating dtype in which most of the network's numbers are stored; None where it has none."""
    counts: dict[torch.dtype, int] = {}
    for _, tensor in named_tensors(network):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)


@torch.no_grad()
def call(network: nn.Module, inputs: tuple[object, ...]) -> Outcome:
    """Call the network; what it raises becomes the outcome's error."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        try:
            output = network(*inputs)
        except Exception as error:  # whatever a forward may raise: the caller reports it as this trial's outcome
            return Outcome({}, _first_line(error))
    return Outcome({name: leaf.cpu() for name, leaf in leaves(output).items()})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".strip(": ")


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def _device(network: nn.Module) -> torch.device | None:
    return next((tensor.device for _, tensor in named_tensors(network)), None)


def _floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _place(value: object, device: torch.device | None, cast: Mapping[torch.dtype, torch.dtype]) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device=device, dtype=cast.get(value.dtype), copy=True)
