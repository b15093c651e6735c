"""Where two networks first differ, by the paths of the modules that both have."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import jit, nn

from repfuse.checking.comparison import level
from repfuse.checking.inputs import Trial
from repfuse.checking.results import FirstDifference, Level
from repfuse.checking.rounding import allowed, rounding, unchanged
from repfuse.checking.runs import Change, Outcome, in_float64, leaves, run_float64
from repfuse.errors import RepfuseError

KEPT = 1 << 16  # elements kept of each module's output, drawn at random: a thousand modules' outputs stay in memory


@dataclass
class ModuleOutputs:
    """What the modules of a network gave in one call, in the order in which they finished.

    ``outputs`` by path and number of the call (``layer1.conv#0``); ``readers`` names the modules that read a
    module's output directly.
    """

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)


def first_difference(original: nn.Module, fused: nn.Module, trial: Trial) -> FirstDifference | None:
    """Return the first module whose output differs by more than rounding and that nothing after puts right.

    A convolution that took in the normalisation behind it differs, and the normalisation's place agrees
    again: a difference does not count where every module that reads the output agrees, or a module that holds
    it does. None where no module that both networks have stays different.
    """
    before, after = _recorded(original, trial), _recorded(fused, trial)
    common = [key for key in before.outputs if key in after.outputs]
    pairs = {key: (before.outputs[key], after.outputs[key]) for key in common}
    errors = {key: level(a, b) if a.shape == b.shape else Level(math.inf, math.inf) for key, (a, b) in pairs.items()}
    limits = _limits(original, before, fused, after, trial)
    same = {key for key in common if not errors[key].exceeds(limits[key])}

    def read_right(key: str) -> bool:
        readers = before.readers.get(key, set())
        return bool(readers) and readers <= same

    wrong = next((key for key in common if not same & {key, *_holders(key, before)} and not read_right(key)), None)
    if wrong is None:
        return None
    agreed = [key for key in common[: common.index(wrong)] if key in same]
    path, last = _path(wrong), _path(agreed[-1]) if agreed else ""
    return FirstDifference(path, last, trial.label, errors[wrong], limits[wrong])


def _recorded(network: nn.Module, trial: Trial, change: Change = in_float64) -> ModuleOutputs:
    record, calls = ModuleOutputs(), Counter[str]()

    def finished(path: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        key = f"{path}#{calls[path]}"
        calls[path] += 1
        for source in filter(None, (getattr(x, "_written_by", "") for x in args)):
            record.readers.setdefault(source, set()).add(key)
        try:
            tensors = leaves(output)
        except RepfuseError:  # a module may return anything to its parent; it is the network that may not
            return
        record.outputs[key] = torch.cat([_kept(tensor) for tensor in tensors.values()] or [torch.empty(0)])
        if isinstance(output, torch.Tensor):
            output._written_by = key  # type: ignore[attr-defined]  # tensors of our own copy's run

    def watch(copy: nn.Module) -> None:
        for noted in (record.outputs, record.readers, calls):
            noted.clear()
        for path, module in copy.named_modules():
            if path and not isinstance(module, jit.ScriptModule):  # which takes no hooks
                module.register_forward_hook(partial(finished, path))

    run_float64(network, [trial], change, watch)
    return record


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    if len(flat) > KEPT:
        chosen = torch.randint(len(flat), (KEPT,), generator=torch.Generator().manual_seed(0))
        flat = flat[chosen.to(flat.device)]
    return flat.to("cpu", torch.float64, copy=True)  # what follows may work in place


def _limits(
    original: nn.Module, before: ModuleOutputs, fused: nn.Module, after: ModuleOutputs, trial: Trial
) -> dict[str, Level]:
    def run(network: nn.Module, change: Change) -> list[Outcome]:
        return [Outcome(_recorded(network, trial, change).outputs)]

    given, found = [Outcome(before.outputs)], [Outcome(after.outputs)]
    first = rounding(original, run, given, unchanged(original, fused))
    second = rounding(fused, run, found, unchanged(fused, original), given)
    limits = allowed([{key: effect[key] for key in first.keys() & second.keys()} for effect in (first, second)])
    return {name: limit for (_, name), limit in limits.items()}


def _holders(key: str, record: ModuleOutputs) -> set[str]:
    """Return the calls within which the call ``key`` was made: of each module above it, the next to finish."""
    finished = list(record.outputs)
    later: dict[str, str] = {}
    for other in finished[finished.index(key) + 1 :]:
        if _path(key).startswith(f"{_path(other)}."):
            later.setdefault(_path(other), other)
    return set(later.values())


def _path(key: str) -> str:
    return key.rpartition("#")[0]
