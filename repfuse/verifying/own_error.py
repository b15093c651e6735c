"""The original's own error in its stored dtype, drawn again where one draw does not settle a drift.

What rounding does in one call is one draw of a random variable, and where an output has few numbers that depend on few
others, a lucky one may be many times smaller than the next. Inputs that are moved by less than a hundredth are of the
same kind and size, and round anew.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_map

from repfuse.verifying.copies import run, run_float64
from repfuse.verifying.inputs import Trial, is_floating, mapped
from repfuse.verifying.measure import level
from repfuse.verifying.results import Level
from repfuse.verifying.rounding import SAMPLES, rms

MOVED = 1 / 128  # of each number, at most


def drawn_again(original: nn.Module, trial: Trial, first: dict[str, Level]) -> dict[str, Level]:
    """Return the rms of the original's error over ``first``, by name of the output, and SAMPLES more draws."""
    moved = [_moved(trial, seed) for seed in range(SAMPLES)]
    exact, stored = run_float64(original, moved), run(original, moved, {})
    draws = {name: [own] for name, own in first.items()}
    for wide, narrow in zip(exact, stored, strict=True):
        for name in draws.keys() & wide.outputs.keys() & narrow.outputs.keys():
            if wide.outputs[name].shape == narrow.outputs[name].shape:
                draws[name].append(level(wide.outputs[name], narrow.outputs[name]))
    return {name: rms(levels) for name, levels in draws.items()}


def _moved(trial: Trial, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)

    def move(x: object) -> object:
        if not isinstance(x, torch.Tensor) or not is_floating(x):
            return x
        factor = 1 + MOVED * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
        return (x.to("cpu", torch.float64) * factor).to(x.device, x.dtype)

    return mapped(trial, lambda inputs: tree_map(move, inputs))
