"""A file that was written, run in its own runtime and held against the original network.

It is allowed what ``repfuse.checking.drift`` allows the fused network in memory: the original's own error, the effect
of rounding the weights, and the last rounding of the output. Inputs that its declared shapes allow have to run and to
agree; of what they exclude, every kind of input is tried at a size that they allow. What they exclude is tried as well:
a format without guards may take it, and it counts where it agrees; where not, it is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn

from repfuse.checking.comparison import with_fallbacks
from repfuse.checking.drift import drift
from repfuse.checking.inputs import input_variants
from repfuse.checking.results import Verified
from repfuse.checking.runs import Outcome, call, run_float64
from repfuse.checking.trial import Trial
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError

Run = Callable[[Sequence[Trial]], tuple[str, Sequence[Outcome]]]
"""Runs a file on some trials: in which runtime, and what it gave."""


def check_written(
    original: nn.Module,
    fused: nn.Module,
    example: Sequence[Any],
    run: Run,
    *,
    gate: nn.Module,
    shapes: tuple[str, ...] = (),
) -> Verified:
    """Run the file that ``fused`` was written to on the inputs of ``input_variants`` and return what was found.

    ``gate`` is a network that refuses what the file's shapes exclude, and ``shapes`` are these as text. Raises
    RepfuseError, with the exit code of a failed check, where the file does not compute what the original does, or where
    that cannot be told.
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
    kept = [index for index in taken if index not in excluded or _alike(expected[index], found[index])]
    chosen = [trials[index] for index in kept]
    measured = drift(
        original, fused, chosen, [expected[index] for index in kept], found=[found[index] for index in kept]
    )
    wrong = {row.trial for row in measured.outputs if not row.passed} & {trials[index].label for index in excluded}
    measured = replace(measured, outputs=tuple(row for row in measured.outputs if row.trial not in wrong))
    worst = measured.worst
    if not measured.passed or worst is None:
        raise RepfuseError(
            f"What was written does not compute what the original does in {runtime}; nothing was kept.",
            measured.reason,
            "Choose another --format. If repfuse verify finds the networks equal, please report it.",
            exit_code=EXIT_FAILED_CHECK,
        )
    compared = tuple(trial.label for trial in chosen if trial.label not in wrong)
    refused = tuple(label for label in (trials[index].label for index in taken) if label not in compared)
    return Verified(runtime, shapes, compared, refused, *worst.numbers)


def _alike(expected: Outcome, found: Outcome) -> bool:
    """Whether both give outputs of the same names and shapes."""
    shapes = {name: tensor.shape for name, tensor in expected.outputs.items()}
    return shapes == {name: tensor.shape for name, tensor in found.outputs.items()}
