"""How far each network, in its own dtype, is from the original in float64.

What is allowed follows from arithmetic. The fused network's error has two independent parts:

- its changed weights were rounded once; that effect is measured (see ``repfuse.checking.rounding``);
- its own operations round. A convolution's rounding error is bounded by g(n) (|W| * |x|), with g(n) growing
with the number n of terms. A fused weight is a sum of branches, so |W| <= sum of |W_i|, and n is no larger
than in all branches together: the bound for the fused network is at most the original's, whose error is
measured as its own drift.

The last rounding, of the output itself, adds half a spacing; it keeps the measure sound where the original
happens to be exact. The safety factor, and the part of trials on which errors happen to cancel, are those of
``rounding``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_map

from repfuse.checking.comparison import reference
from repfuse.checking.inputs.trial import Trial, is_floating, mapped
from repfuse.checking.measure import half_the_digits, level
from repfuse.checking.results import Drift, Level, OutputDrift
from repfuse.checking.rounding import SAMPLES, Levels, RoundingEffects, allowed, keys_of, rms, settle
from repfuse.checking.runs import Outcome, run, run_float64
from repfuse.networks import between, main_dtype
from repfuse.wording import dtype_name

# The original's own error in its stored dtype, drawn again where one draw does not settle a drift.
#
# What rounding does in one call is one draw of a random variable, and where an output has few numbers that depend on
# few others, a lucky one may be many times smaller than the next. Inputs that are moved by less than a hundredth are of
# the same kind and size, and round anew.


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


def drift(
    original: nn.Module,
    fused: nn.Module,
    trials: Sequence[Trial],
    exact: Sequence[Outcome] | None = None,
    *,
    found: Sequence[Outcome] | None = None,
    effect: RoundingEffects | None = None,
) -> Drift:
    """Measure both networks in the dtype they are stored in against the original in float64.

    ``fused`` is expected to hold weights computed in float64 and rounded once; what that does to its outputs is the
    ``effect``. ``exact`` are the original's outcomes in float64 on ``trials``, ``found`` those of ``fused`` as it is
    stored, in whatever runtime. Each is computed where it is not given. Where a drift exceeds what borrowed effects and
    one draw of the original's own error explain, both are measured on that very trial. Neither network is changed.
    Raises RepfuseError where the original cannot run the first trial in float64.
    """
    exact = reference(original, trials) if exact is None else exact
    effect = effect or RoundingEffects(fused, original, trials, run_float64(fused, trials), scale=exact)
    after = run(fused, trials, between(original, fused)) if found is None else found
    before = run(original, trials, {})
    keys = [key for key in keys_of(exact) if _sound(exact, before, key)]
    if not keys:
        return Drift((), measured=False, problem=_why_unmeasured(before, main_dtype(original)))
    if problem := _problem(trials, keys, before, after, alike=main_dtype(original) == main_dtype(fused)):
        return Drift((), problem=problem)
    effect.measure_usual()
    own = {key: _level(exact, before, key) for key in keys}

    def excessive() -> set[int]:
        rows = _rows(trials, exact, after, own, effect.levels(own))
        return {position for (position, _), row in zip(own, rows, strict=True) if not row.passed}

    def measure(position: int) -> None:
        effect.measure([position])
        again = drawn_again(original, trials[position], {name: own[at, name] for at, name in own if at == position})
        own.update({(position, name): error for name, error in again.items()})

    settle(excessive, measure, effect.cheapest)
    return Drift(_rows(trials, exact, after, own, effect.levels(own)))


def _rows(
    trials: Sequence[Trial], exact: Sequence[Outcome], after: Sequence[Outcome], own: Levels, effect: Levels
) -> tuple[OutputDrift, ...]:
    last = {key: _last_rounding(after[key[0]].outputs[key[1]]) for key in own}
    limits = allowed([own, effect, last])
    if any("" in outcome.narrow for outcome in exact):  # its own error is not to be had: half the digits have to agree
        half = {key: half_the_digits(after[key[0]].outputs[key[1]].dtype) for key in own}
        limits = {key: Level(each, each) for key, each in half.items()}
    return tuple(
        OutputDrift(
            trial=trials[key[0]].label,
            name=key[1],
            dtype=dtype_name(after[key[0]].outputs[key[1]].dtype),
            own=own[key],
            fused=_level(exact, after, key),
            rounding=effect[key],
            allowed=limits[key],
        )
        for key in own
    )


def _level(exact: Sequence[Outcome], found: Sequence[Outcome], key: tuple[int, str]) -> Level:
    position, name = key
    return level(exact[position].outputs[name], found[position].outputs[name])


def _last_rounding(output: torch.Tensor) -> Level:
    """Return the level of rounding an output once: uniform within half a spacing."""
    eps = torch.finfo(output.dtype).eps if output.is_floating_point() else 0.0
    return Level(eps / 2 / math.sqrt(3), eps / 2)


def _sound(exact: Sequence[Outcome], before: Sequence[Outcome], key: tuple[int, str]) -> bool:
    """Whether the original in its own dtype gives a number wherever it does in float64."""
    position, name = key
    a, b = exact[position].outputs.get(name), before[position].outputs.get(name)
    if a is None or b is None or a.shape != b.shape:
        return False
    return a.numel() > 0 and math.isfinite(level(a, b).max)


def _why_unmeasured(before: Sequence[Outcome], dtype: torch.dtype | None) -> str:
    name = dtype_name(dtype)
    return f"the original cannot run in {name} here ({before[0].error or 'its outputs overflow'})"


def _problem(
    trials: Sequence[Trial],
    keys: Sequence[tuple[int, str]],
    before: Sequence[Outcome],
    after: Sequence[Outcome],
    *,
    alike: bool,
) -> str:
    for position, name in keys:
        label, expected = trials[position].label, before[position].outputs[name]
        found = after[position].outputs.get(name)
        if found is None:
            return f"{label}: only the original runs ({after[position].error or f'{name} is missing'})"
        if found.shape != expected.shape or (alike and found.dtype != expected.dtype):
            return f"{label}: {name} is {_form(found)}, in the original {_form(expected)}"
    return ""


def _form(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
