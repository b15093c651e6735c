"""How far each network, in its own dtype, is from the original in float64; and what both are found to differ by.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from repfuse.checking.comparison import (
    answers_in_float64,
    half_the_digits,
    informative,
    level,
    mismatch,
    reference,
    tabulate,
    with_fallbacks,
)
from repfuse.checking.inputs import Trial, input_variants, is_floating, mapped
from repfuse.checking.results import Drift, Level, OutputDrift, OutputError, OutputVerdict, TrialComparison, Verified
from repfuse.checking.rounding import SAMPLES, Levels, RoundingEffects, allowed, combined, explained, rms, settle
from repfuse.checking.runs import Key, Outcome, by_key, call, narrow_in, run, run_float64
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.networks import between, main_dtype
from repfuse.wording import Progress, dtype_name

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
    draws = {name: [each for each in levels if math.isfinite(each.max)] for name, levels in draws.items()}
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
    ``effect``, which is measured where one draw of the original's own error does not explain all: it takes several runs
    in float64. ``exact`` are the original's outcomes in float64 on ``trials``, ``found`` those of ``fused`` as it is
    stored, in whatever runtime, and ``own`` those of the original in the same. Each is computed where it is not given.
    Where a drift exceeds what borrowed effects explain as well, both are measured on that very trial. Neither network
    is changed. Raises RepfuseError where the original cannot run the first trial in float64.
    """
    exact = reference(original, trials) if exact is None else exact
    effect = effect or RoundingEffects(fused, original, trials, exact)
    after = run(fused, trials, between(original, fused)) if found is None else found
    before = run(original, trials, {}) if own is None else own
    wide, wanted, given = by_key(exact), by_key(before), by_key(after)
    alike = (key for key, x in wide.items() if x.numel() and key in wanted and x.shape == wanted[key].shape)
    drawn = {key: level(wide[key], wanted[key]) for key in alike}
    drawn = {key: own for key, own in drawn.items() if math.isfinite(own.max)}  # elsewhere its dtype overflows
    if not drawn:
        why = before[0].error or "its outputs overflow"
        problem = f"the original cannot run in {dtype_name(main_dtype(original))} here ({why})"
        return Drift((), measured=False, problem=problem)
    same_dtype = main_dtype(original) == main_dtype(fused)
    for position, name in drawn:
        x, other = wanted[position, name], given.get((position, name))
        if other is None:
            problem = f"only the original runs ({after[position].error or f'{name} is missing'})"
        else:
            problem = mismatch({name: x}, {name: other if same_dtype else other.to(x.dtype)})
        if problem:
            return Drift((), problem=f"{trials[position].label}: {problem}")
    told = {key: (trials[key[0]].label, key[1], dtype_name(given[key].dtype)) for key in drawn}
    errors = {key: level(wide[key], given[key]) for key in drawn}
    without = any("" in outcome.narrow for outcome in exact)  # then its own error is not to be had

    def rows() -> dict[Key, OutputDrift]:
        explained = effect.levels(drawn) if effect.measured else {}
        if without:
            limits = {key: Level(half, half) for key in drawn for half in [half_the_digits(given[key].dtype)]}
        else:
            rounded = {key: _last_rounding(given[key]) for key in drawn}
            limits = allowed([drawn, rounded, explained] if explained else [drawn, rounded])
        return {key: OutputDrift(*told[key], drawn[key], errors[key], explained.get(key), limits[key]) for key in drawn}

    def excessive() -> set[int]:
        return {position for (position, _), row in rows().items() if not row.passed}

    def measure(position: int) -> None:
        effect.measure([position])
        again = drawn_again(original, trials[position], {name: drawn[at, name] for at, name in drawn if at == position})
        drawn.update({(position, name): error for name, error in again.items()})

    if excessive():  # without what rounding explains, which only adds to what is allowed
        effect.measure_usual()
        settle(excessive, measure, effect.cheapest)
    return Drift(tuple(rows().values()))


def _last_rounding(output: torch.Tensor) -> Level:
    """Return the level of rounding an output once: uniform within half a spacing."""
    eps = torch.finfo(output.dtype).eps if output.is_floating_point() else 0.0
    return Level(eps / 2 / math.sqrt(3), eps / 2)


# Everything that a verdict on two networks rests on, gathered once.

MEASURED = 0.75  # of the whole: real data, the sites and the place of a difference follow


@dataclass(frozen=True)
class Evidence:
    """What was measured. Keys are a position in ``trials`` and the name of an output.

    ``table`` holds a row per trial that was ``tried``, there with the original's outcome; ``trials`` are only those in
    which both networks gave ``outputs`` of the same form. ``outcomes`` are the original's in float64, ``answers`` the
    fused network's. ``settled`` are the positions on which everything was measured that could explain an error; where
    one is too large and settled, others need not be.
    """

    table: tuple[TrialComparison, ...]
    tried: tuple[tuple[Trial, Outcome], ...]
    trials: Sequence[Trial] = ()
    outcomes: Sequence[Outcome] = ()
    answers: Sequence[Outcome] = ()
    outputs: Mapping[Key, OutputError] = field(default_factory=dict)
    rounding: Levels = field(default_factory=dict)
    limits: Levels = field(default_factory=dict)
    drift: Drift | None = None
    settled: frozenset[int] = frozenset()

    @property
    def worst(self) -> Key:
        """The output that comes closest to its limit, or furthest above; where errors stand, one of these."""
        return max(self.outputs, key=self._rank)

    def excess(self, key: Key) -> float:
        """Return the error in units of what is allowed."""
        return self.outputs[key].relative.over(self.limits[key])

    @property
    def narrow(self) -> tuple[str, ...]:
        """The modules of either network that have no float64, and ran in their own dtype."""
        return narrow_in((*self.outcomes, *self.answers))

    @property
    def mismatched(self) -> TrialComparison | None:
        """The first trial on which something differs that is no number."""
        return next((row for row in self.table if row.mismatch), None)

    @property
    def names(self) -> list[str]:
        """The outputs, each once."""
        return [*dict.fromkeys(name for _, name in self.outputs)]

    @property
    def vacuous(self) -> list[str]:
        """The outputs that have no finite number other than 0 on any trial: to agree in these says nothing."""
        telling = {name for (_, name), output in by_key(self.outcomes).items() if informative(output)}
        return [name for name in self.names if name not in telling]

    @property
    def informative(self) -> bool:
        """Whether any output has a finite number other than 0."""
        return len(self.vacuous) < len(self.names)

    def rows(self) -> tuple[OutputVerdict, ...]:
        """Return a row per output: its worst trial, and its worst drift."""
        drifts = self.drift.by_output if self.drift else {}

        def row(name: str) -> OutputVerdict:
            worst = max((key for key in self.outputs if key[1] == name), key=self._rank)
            found = self.outputs[worst], self.rounding[worst], self.limits[worst]
            return OutputVerdict(name, self.trials[worst[0]].label, *found, drifts.get(name))

        return tuple(map(row, self.names))

    def _rank(self, key: Key) -> tuple[bool, float]:
        times = self.excess(key)
        return times > 1 and key[0] in self.settled, times


def gather(original: nn.Module, fused: nn.Module, trials: Sequence[Trial], progress: Progress) -> Evidence:
    """Run both networks in float64 and as they are stored, and measure what rounding explains.

    Raises RepfuseError where the original cannot run the first trial in float64.
    """
    progress("the original in float64", 0.0)
    trials, expected = with_fallbacks(original, trials)
    progress("the fused network in float64", 0.1)
    found = answers_in_float64(fused, trials, expected)
    table, tried = tabulate(trials, expected, found).trials, tuple(zip(trials, expected, strict=True))
    kept = [position for position, row in enumerate(table) if not row.skipped and not row.mismatch]
    outputs = {(number, each.name): each for number, at in enumerate(kept) for each in table[at].outputs}
    if not outputs:
        return Evidence(table, tried)
    trials, expected, found = [trials[at] for at in kept], [expected[at] for at in kept], [found[at] for at in kept]
    progress("what rounding explains", 0.2)
    before = RoundingEffects(original, fused, trials, expected, expected)
    after = RoundingEffects(fused, original, trials, expected, found)
    effects, settled = explained(before, after, {key: each.relative for key, each in outputs.items()})
    progress("drift", 0.6)
    measured = drift(original, fused, trials, expected, effect=after)
    what = combined(effects), allowed(effects), measured, frozenset(settled)
    return Evidence(table, tried, trials, expected, found, outputs, *what)


# A file that was written, run in its own runtime and held against the original network.
#
# It is allowed what ``drift`` allows the fused network in memory: the original's own error, the effect of rounding the
# weights, and the last rounding of the output. Inputs that its declared shapes allow have to run and to agree; of what
# they exclude, every kind of input is tried at a size that they allow. What they exclude is tried as well: a format
# without guards may take it, and it counts where it agrees; where not, it is listed.


Run = Callable[[Sequence[Trial]], tuple[str, Sequence[Outcome]]]
"""Runs a file on some trials: in which runtime, and what it gave."""


def check_written(
    original: nn.Module, fused: nn.Module, example: Sequence[Any], run: Run, *, gate: nn.Module
) -> Verified:
    """Run the file that ``fused`` was written to on the inputs of ``input_variants`` and return what was found.

    ``gate`` is a network that refuses what the file's shapes exclude. Raises RepfuseError, with the exit code of a
    failed check, where the file does not compute what the original does, or where that cannot be told.
    """
    trials, expected = with_fallbacks(original, input_variants(example))
    others = [index for index, outcome in enumerate(expected) if index and not outcome.error]
    excluded = {index for index in others if call(gate, trials[index].inputs).error}
    instead: list[Trial] = []
    for index in sorted(excluded):  # the first of what may stand in its place that the shapes allow
        fitting = (other for other in trials[index].otherwise() if not call(gate, other.inputs).error)
        instead += islice(fitting, 1)
    trials, expected = trials + instead, expected + run_float64(original, instead)
    runtime, found = run(trials)
    taken = [index for index, outcome in enumerate(expected) if not outcome.error]

    def on(*at: int) -> Drift:
        return drift(original, fused, [trials[i] for i in at], [expected[i] for i in at], found=[found[i] for i in at])

    measured = on(*(index for index in taken if index not in excluded))
    alone = {index: on(index) for index in sorted(excluded) if not found[index].error}
    agreeing = {index: each.outputs for index, each in alone.items() if each.passed}
    measured = replace(measured, outputs=sum(agreeing.values(), measured.outputs))
    worst = measured.worst
    if not measured.passed or worst is None:
        raise RepfuseError(
            f"What was written does not compute what the original does in {runtime}; nothing was kept.",
            measured.reason,
            "Choose another --format. If repfuse verify finds the networks equal, please report it.",
            exit_code=EXIT_FAILED_CHECK,
        )
    compared = tuple(trials[index].label for index in taken if index not in excluded or index in agreeing)
    refused = tuple(label for label in (trials[index].label for index in taken) if label not in compared)
    return Verified(runtime, (), compared, refused, *worst.numbers)
