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

from repfuse.checking.comparison import half_the_digits, level, mismatch, reference
from repfuse.checking.results import Drift, Level, OutputDrift
from repfuse.checking.rounding import SAMPLES, RoundingEffects, allowed, rms, settle
from repfuse.checking.runs import Key, Outcome, by_key, run, run_float64
from repfuse.checking.trial import Trial, is_floating, mapped
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
    own: Sequence[Outcome] | None = None,
    effect: RoundingEffects | None = None,
) -> Drift:
    """Measure both networks in the dtype they are stored in against the original in float64.

    ``fused`` is expected to hold weights computed in float64 and rounded once; what that does to its outputs is the
    ``effect``. ``exact`` are the original's outcomes in float64 on ``trials``, ``found`` those of ``fused`` as it is
    stored, in whatever runtime, and ``own`` those of the original in the same. Each is computed where it is not given.
    Where a drift exceeds what borrowed effects and one draw of the original's own error explain, both are measured on
    that very trial. Neither network is changed. Raises RepfuseError where the original cannot run the first trial in
    float64.
    """
    exact = reference(original, trials) if exact is None else exact
    effect = effect or RoundingEffects(fused, original, trials, run_float64(fused, trials), scale=exact)
    after = run(fused, trials, between(original, fused)) if found is None else found
    before = run(original, trials, {}) if own is None else own
    wide, wanted, given = by_key(exact), by_key(before), by_key(after)
    wide = {key: x for key, x in wide.items() if _sound(x, wanted.get(key))}
    if not wide:
        why = before[0].error or "its outputs overflow"
        problem = f"the original cannot run in {dtype_name(main_dtype(original))} here ({why})"
        return Drift((), measured=False, problem=problem)
    alike = main_dtype(original) == main_dtype(fused)
    for key in wide:
        found_here, name = given.get(key), key[1]
        if found_here is None:
            problem = f"only the original runs ({after[key[0]].error or f'{name} is missing'})"
        else:
            problem = mismatch({name: wanted[key]}, {name: found_here if alike else found_here.to(wanted[key].dtype)})
        if problem:
            return Drift((), problem=f"{trials[key[0]].label}: {problem}")
    effect.measure_usual()
    drawn = {key: level(x, wanted[key]) for key, x in wide.items()}
    errors = {key: level(x, given[key]) for key, x in wide.items()}
    last = {key: _last_rounding(given[key]) for key in wide}
    without = any("" in outcome.narrow for outcome in exact)  # then its own error is not to be had

    def rows() -> dict[Key, OutputDrift]:
        explained = effect.levels(drawn)
        limits = allowed([drawn, explained, last])
        if without:
            limits = {key: Level(half, half) for key in drawn for half in [half_the_digits(given[key].dtype)]}
        return {
            key: OutputDrift(
                trial=trials[key[0]].label,
                name=key[1],
                dtype=dtype_name(given[key].dtype),
                own=drawn[key],
                fused=errors[key],
                rounding=explained[key],
                allowed=limits[key],
            )
            for key in drawn
        }

    def excessive() -> set[int]:
        return {position for (position, _), row in rows().items() if not row.passed}

    def measure(position: int) -> None:
        effect.measure([position])
        again = drawn_again(original, trials[position], {name: drawn[at, name] for at, name in drawn if at == position})
        drawn.update({(position, name): error for name, error in again.items()})

    settle(excessive, measure, effect.cheapest)
    return Drift(tuple(rows().values()))


def _last_rounding(output: torch.Tensor) -> Level:
    """Return the level of rounding an output once: uniform within half a spacing."""
    eps = torch.finfo(output.dtype).eps if output.is_floating_point() else 0.0
    return Level(eps / 2 / math.sqrt(3), eps / 2)


def _sound(wide: torch.Tensor, stored: torch.Tensor | None) -> bool:
    """Whether the original in its own dtype gives a number wherever it does in float64."""
    if stored is None or stored.shape != wide.shape:
        return False
    return wide.numel() > 0 and math.isfinite(level(wide, stored).max)
