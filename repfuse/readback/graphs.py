"""A graph of ONNX that was edited: read again, and run beside the one that it was made from, in ONNX Runtime."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repfuse.checking.comparison import half_the_digits, with_fallbacks
from repfuse.checking.drift import drift
from repfuse.checking.inputs import input_variants
from repfuse.checking.results import Drift, Verified
from repfuse.checking.rounding import RoundingEffects
from repfuse.checking.runs import Outcome, run
from repfuse.checking.trial import Trial
from repfuse.checkpoint import onnx_file
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.readback.checking import Written, not_the_same, patience
from repfuse.readback.messages import Answer, Fingerprint, Job, digests
from repfuse.readback.process import Reader

if TYPE_CHECKING:
    import onnx_ir as ir


def graph_job(written: Written, path: Path) -> Job:
    """Return the job of reading the file of a graph at ``path``, and of running it."""
    names = tuple(run(written.original, [Trial("the example", tuple(written.example))], {})[0].outputs)
    return Job("onnx", str(path.resolve()), torch.get_num_threads(), module=True, outputs=names)


def check_graph(written: Written, before: Path, model: ir.Model, job: Job, reader: Reader, *, runs: bool) -> Verified:
    """Have the file of ``model`` read by ``reader``, and where it ``runs`` run, and return what was found.

    It is held against the file that it was made from, ``before``, which runs here in the same runtime. Raises
    RepfuseError, with the exit code of a failed check, where it holds or computes something else.
    """
    from repfuse.checkpoint.onnx_graph.reading import held, shapes_said  # onnx takes a second to import

    started = time.perf_counter()
    trials, exact, own, problem = _of_original(written, before, job) if runs else ([], [], [], "")
    reader.ask(replace(job, inputs=tuple(trial.inputs for trial in trials)))
    answer = reader.answer(patience(Path(job.path), time.perf_counter() - started))
    tensors, read = digests(held(model)), answer.network or Fingerprint()
    if wrong := sorted(name for name, _ in tensors.items() ^ read.tensors.items()):
        raise not_the_same(wrong[0])
    labels = tuple(trial.label for trial in trials)
    found = Verified(problem or answer.runtime, tuple(shapes_said(model).values()), labels, ())
    found = replace(found, where=reader.name, tensors=len(tensors))
    if trials:
        found = replace(found, **_judged(written, trials, exact, own, answer))
    return replace(found, seconds=time.perf_counter() - started)


def _of_original(written: Written, path: Path, job: Job) -> tuple[list[Trial], list[Outcome], list[Outcome], str]:
    """Return the trials that the original takes, with its outcomes in float64 and in ONNX Runtime.

    Raises RepfuseError where the two are further apart than half of the digits: then the file was misread. Less is the
    runtime's own affair, which folds norms in the file's dtype and sums in another order: its mean of 12,544 pixels,
    one after the other, is 20 times further off than torch's. Where ONNX Runtime does not run it here, there are no
    trials; why comes last.
    """
    tried, expected = with_fallbacks(written.original, input_variants(written.example))
    try:
        found = _in_runtime(path, job, tried, expected)
    except RepfuseError as error:
        return [], [], [], f"not run, since {onnx_file.runtime_name()} does not take the original: {error.why}"
    taken = [index for index, outcome in enumerate(found) if not outcome.error]
    if not taken:
        return [], [], [], f"not run, since {onnx_file.runtime_name()} does not run the original: {found[0].error}"
    trials = [tried[index] for index in taken]
    exact, own = ([each[index] for index in taken] for each in (expected, found))
    effect = RoundingEffects(written.original, written.original, trials, exact)
    measured = drift(written.original, written.original, trials, exact, found=own, effect=effect)
    far = any(each.fused.max > half_the_digits(getattr(torch, each.dtype)) for each in measured.outputs)
    if measured.measured and not measured.passed and (measured.problem or far):
        raise _wrong("The file was not understood: ONNX Runtime computes something else of it", measured)
    return trials, exact, own, ""


def _in_runtime(path: Path, job: Job, trials: list[Trial], expected: list[Outcome]) -> list[Outcome]:
    """Run the file on the trials that the network takes, in a session that ends with it."""
    run_file = onnx_file.runner(path, job.outputs)
    both = zip(trials, expected, strict=True)
    return [outcome if outcome.error else run_file(trial.inputs) for trial, outcome in both]


def _judged(
    written: Written, trials: list[Trial], exact: list[Outcome], own: list[Outcome], answer: Answer
) -> dict[str, Any]:
    measured = drift(written.original, written.module, trials, exact, found=answer.outcomes, own=own)
    if not measured.measured:
        return {"runtime": f"not judged: {measured.problem}"}
    worst = measured.worst
    if not measured.passed or worst is None:
        raise _wrong("What was written does not compute in ONNX Runtime what the original does there", measured)
    return dict(zip(("error", "own", "allowed"), worst.numbers, strict=True))


def _wrong(what: str, measured: Drift) -> RepfuseError:
    return RepfuseError(
        f"{what}; nothing was kept.",
        measured.reason,
        "Please report it, with the file if you can.",
        exit_code=EXIT_FAILED_CHECK,
    )
