"""Runs of a network in another precision, that leave nothing behind.

The network that is handed in is never called and never changed: some networks cache what they compute, and the copy
that is called carries that away with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import jit, nn

from repfuse.networks import (
    device_of,
    join,
    named_modules,
    named_tensors,
    own_tensors,
    placed,
    same_randomness,
    set_eval,
)
from repfuse.recording.copies import changed_copy
from repfuse.recording.read_only import MemoryKept, ReadOnly
from repfuse.verifying.inputs import Trial
from repfuse.verifying.outputs import leaves
from repfuse.verifying.widening import WIDE, Change, Widening
from repfuse.wording import described

SEED = 0  # of networks that draw random numbers: both draw the same

Watch = Callable[[nn.Module], object]
"""Is shown a copy of a network before it is called, to hang hooks on it."""


def unwatched(_copy: nn.Module) -> None:
    """Look away."""


@dataclass(frozen=True)
class Outcome:
    """What one call gave: its output tensors by name (on the CPU), or else why it failed."""

    outputs: dict[str, torch.Tensor]
    error: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether it gave no number at all: a crop may leave nothing, where a convolution refuses to go on."""
        return not any(output.numel() for output in self.outputs.values())


def in_float64(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Widen a floating tensor, exactly; leave integers, booleans and complex numbers."""
    return widened(tensor) if tensor.is_floating_point() else tensor.clone()


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float64 copy: of its own, also where the tensor is in float64."""
    return tensor.to(torch.float64, copy=True)


def as_stored(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor as it is."""
    return tensor.clone()


def as_it_is(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory, where that can be seen to: nothing must write into it."""
    return tensor if tensor.layout is torch.strided and not tensor.is_inference() else tensor.clone()


def copy_with(network: nn.Module, change: Change) -> nn.Module:
    """Return a copy in eval mode whose tensors are ``change(name, tensor)``; shared ones stay shared.

    Raises RepfuseError where the network cannot be copied.
    """
    copied = changed_copy(network, lambda name, tensor: change(name, tensor.detach()))
    for path, module in named_modules(copied):
        if isinstance(module, jit.ScriptModule):  # which is copied with its tensors as they are
            for name, tensor in own_tensors(module).items():
                tensor.data = change(join(path, name), tensor.detach())
    for parameter in copied.parameters():
        if parameter.is_leaf:  # a scripted module copies its parameters with their history
            parameter.requires_grad_(False)
    set_eval(copied)
    return copied


def run(network: nn.Module, trials: Iterable[Trial], cast: Mapping[torch.dtype, torch.dtype]) -> list[Outcome]:
    """Call a copy of the network on each trial, floating inputs cast as ``cast`` says (dtypes not named stay).

    The copy lies over the network's own memory; one that writes into it gets memory of its own. Raises RepfuseError
    where the network cannot be copied.
    """
    trials = list(trials)
    copy = copy_with(network, as_it_is)
    with ReadOnly(dict(named_tensors(copy))) as mode, MemoryKept(mode):
        outcomes = run_copy(copy, trials, cast)
    alone = mode.wrong or any(outcome.error for outcome in outcomes[:1])  # which may be the watching itself
    return run_copy(copy_with(network, as_stored), trials, cast) if alone else outcomes


def run_copy(copy: nn.Module, trials: Iterable[Trial], cast: Mapping[torch.dtype, torch.dtype]) -> list[Outcome]:
    """Call one of our copies itself on each trial: the call may change it."""
    device = device_of(copy)
    return [call(copy, placed(trial.inputs, device, cast)) for trial in trials]


def run_float64(
    network: nn.Module,
    trials: Iterable[Trial],
    change: Change = in_float64,
    watch: Watch = unwatched,
) -> list[Outcome]:
    """Call a copy of the network in float64 on each trial, inputs widened too; its tensors are as ``change`` says.

    ``watch`` is shown the copy before it is called. Raises RepfuseError where the network cannot be copied.
    """
    copy = copy_with(network, change)
    watch(copy)
    device, widening = device_of(copy), Widening(copy)
    outcomes = []
    for trial in trials:
        inputs = placed(trial.inputs, device, WIDE)
        with widening:
            outcomes.append(call(copy, inputs))
    return outcomes


@torch.no_grad()
def call(network: nn.Module, inputs: tuple[object, ...]) -> Outcome:
    """Call the network; what it raises becomes the outcome's error."""
    with same_randomness(network):
        torch.manual_seed(SEED)
        try:
            output = network(*inputs)
        except Exception as error:  # whatever a forward may raise
            return Outcome({}, described(error))
    return Outcome({name: leaf.to("cpu", copy=True) for name, leaf in leaves(output).items()})
