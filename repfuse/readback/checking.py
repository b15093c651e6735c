"""A file that was written, held against the networks in memory that it was made from, as a reader finds it again.

It is read with the options that its user would need to give, and no others. The file holds what was proven where it has
the same tensors, bit by bit, in modules that are set the same. It is run as well, for a user does no less. On one
machine the same numbers give the same outputs, bit by bit, and then what was found of the network in memory holds for
the file. Where its tensors lie otherwise in memory, sums may add up in another order: then its outputs are judged like
those of any fused network, see ``repfuse.checking.drift``; so are those of a file that runs in another runtime.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from repfuse.checking.comparison import half_the_digits, with_fallbacks
from repfuse.checking.drift import check_written, drift
from repfuse.checking.inputs import Trial, input_variants
from repfuse.checking.results import Drift, Verified
from repfuse.checking.rounding import RoundingEffects
from repfuse.checking.runs import Outcome, run
from repfuse.checkpoint import onnx_file, torch_pickle
from repfuse.checkpoint.build import is_buildable
from repfuse.checkpoint.contents import Around
from repfuse.checkpoint.spec import as_texts
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.loading import Checkpoint
from repfuse.memory import give_back
from repfuse.networks import device_of
from repfuse.readback.process import Reader
from repfuse.readback.reading import FileKind, Fingerprint, Job, digests, fingerprint_of, rest_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

Check = Callable[..., Callable[[], Verified]]  # of a Reader, whether it runs the file, and whether that is to be quick


def _compare_tensors(written: Mapping[str, str], read: Mapping[str, str]) -> None:
    if wrong := sorted(name for name, _ in written.items() ^ read.items()):
        raise not_the_same(wrong[0])


# A file of a network or of weights.


def check_read(
    written: Checkpoint,
    module: nn.Module,
    job: Job,
    reader: Reader,
    *,
    runs: bool,
    quick: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Callable[[], Verified]:
    """Have the file of ``module`` read by ``reader``, and return what waits for its answer and returns what was found.

    Around the module the file has what is around the network in ``written``; ``state`` is given where it holds these
    tensors and nobody knows their network. Unless it ``runs``, its tensors alone count; where it is to be ``quick``, it
    runs on one input alone, the smaller that the network takes. That raises RepfuseError, with the exit code of a
    failed check, where the file is not what was written.
    """
    trials = telling(written.example_inputs) if runs and state is None else ()
    known: list[Outcome] = []
    if quick:
        tried = ((trial, run(module, [trial], {})) for trial in sorted(trials, key=lambda trial: trial.work))
        trials, known = next((((trial,), own) for trial, own in tried if not own[0].error), (trials, []))
    reader.ask(job, trials)

    def answered() -> Verified:
        started = time.perf_counter()
        expected = known or run(module, trials, {})
        own = fingerprint_of(module, module=job.module) if state is None else Fingerprint(digests(state))
        answer = reader.answer()
        if what := own.differs(answer.network, modules=runs):
            raise not_the_same(what)
        rest = rest_of(written.around if job.kind == "network" else Around(), written.metadata)
        if lost := rest.items() ^ answer.rest.items():
            raise not_the_same(f"what stands around the network, {min(key for key, _ in lost).partition('.')[2]}")
        found = Verified(answer.runtime, (), (), (), where=reader.name, tensors=len(own.tensors))
        found = _judged(found, written.module, module, list(zip(trials, expected, strict=True)), answer.outcomes)
        return replace(found, seconds=time.perf_counter() - started)

    return answered


def telling(example: Sequence[Any]) -> tuple[Trial, ...]:
    """Return the example and the input whose size is most unlike it: not square, and about a quarter as large."""
    first, *others = input_variants(example)
    sizes = [trial for trial in others if trial.label.startswith("size")]
    return (first, *(sizes or others)[:1])


def _judged(
    found: Verified,
    original: nn.Module,
    module: nn.Module,
    expected: Sequence[tuple[Trial, Outcome]],
    given: Sequence[Outcome],
) -> Verified:
    """Add what the runs gave: on the inputs that the network in memory takes."""
    taken = [(trial, own, read) for (trial, own), read in zip(expected, given, strict=True) if not own.error]
    for trial, _, read in taken:
        if read.error:
            raise not_the_same(f"{trial.label}: only the network in memory runs ({read.error})")
    found = replace(found, compared=tuple(trial.label for trial, _, _ in taken))
    if all(digests(own.outputs) == digests(read.outputs) for _, own, read in taken):
        return replace(found, identical=bool(taken))
    tried, outcomes = [trial for trial, _, _ in taken], [read for _, _, read in taken]
    measured = drift(original, module, tried, found=outcomes)
    if measured.worst is None or not measured.passed:
        raise not_the_same(f"its outputs, and no rounding explains it. {measured.reason}")
    error, own, allowed = measured.worst.numbers
    return replace(found, error=error, own=own, allowed=allowed)


def not_the_same(what: str) -> RepfuseError:
    """Return the error for a file that does not read as it was written."""
    return RepfuseError(
        "What was read back is not what was written; nothing was kept.",
        f"It differs in {what.rstrip('.')}.",
        "Try again, and on another disk. If it stays so, please report it.",
        exit_code=EXIT_FAILED_CHECK,
    )


def job_of(kind: FileKind, path: Path, **said: Any) -> Job:
    """Return the job for a file, which takes as many threads as there are here."""
    return Job(kind, str(path.resolve()), torch.get_num_threads(), **said)


def network_job(checkpoint: Checkpoint, path: Path, *, trust: bool) -> Job:
    """Return the job for a file that holds its network as modules, in what was around it in ``checkpoint``.

    It may need ``trust`` where the checkpoint did not: what it holds was pickled just now from objects that this
    process has, and reading it runs the code of their classes, which ran here.
    """
    loading = _loading(checkpoint, checkpoint.around.keys) | {"trust": trust}
    return job_of("network", path, loading=loading, module=True, needs=tuple(torch_pickle.modules_named(path)))


def weights_job(checkpoint: Checkpoint, path: Path, keys: tuple[str, ...]) -> Job:
    """Return the job for a file of weights that says how its network is built.

    Where that means running code, the user has to say it again.
    """
    source = checkpoint.source
    assert source is not None
    said = {} if is_buildable(source, checkpoint.code) else {"model": source.spec, "model_args": as_texts(source)}
    needs = (source.parts[0],) if source.kind == "import" else ()
    return job_of("network", path, loading=_loading(checkpoint, keys) | said, needs=needs)


def _loading(checkpoint: Checkpoint, keys: tuple[str, ...]) -> dict[str, Any]:
    device = str(device_of(checkpoint.module))
    return {"weights": ".".join(keys) or "auto", "allow": list(checkpoint.allow), "device": device}


# A file of an exported program or of ONNX, run in its own runtime and held against the original network.


def program_job(checkpoint: Checkpoint, path: Path, kind: FileKind, *, module: bool = False) -> Job:
    """Return the job of running the file at ``path``, and of saying what a graph of ONNX, a ``module``, holds.

    ONNX names no outputs: they are those of the original.
    """
    example = [Trial("the example", checkpoint.example_inputs)]
    outputs = tuple(run(checkpoint.module, example, {})[0].outputs) if kind == "onnx" else ()
    return job_of(kind, path, module=module, outputs=outputs)


def check_program(
    checkpoint: Checkpoint, module: nn.Module, program: ExportedProgram, job: Job, reader: Reader, *, runs: bool
) -> Verified:
    """Have the file of ``program`` read by ``reader``, and where it ``runs`` run, and return what was found.

    Raises RepfuseError, with the exit code of a failed check, where it does not compute what the original does.
    """
    from repfuse.checkpoint.exported import complete, contract_of, network_of  # which take a second to import

    started, contract = time.perf_counter(), contract_of(program)
    tensors = digests(program.state_dict) if job.kind == "pt2" else {}

    def run_file(trials: Sequence[Trial]) -> tuple[str, Sequence[Outcome]]:
        reader.ask(job, trials)
        answer = reader.answer()
        if job.kind == "pt2":
            _compare_tensors(tensors, answer.network.tensors)
            if answer.contract != contract.describe():
                raise not_the_same("its dynamic shapes")
        return answer.runtime, answer.outcomes

    if not runs:
        return Verified(run_file(())[0], (), (), ())
    gate = network_of(complete(program, Path()))
    found = check_written(checkpoint.module, module, checkpoint.example_inputs, run_file, gate=gate)
    shapes, seconds = tuple("x".join(map(str, axes)) for axes in contract.axes), time.perf_counter() - started
    return replace(found, shapes=shapes, where=reader.name, tensors=len(tensors), seconds=seconds)


# A graph of ONNX that was edited, run beside the one that it was made from, in ONNX Runtime.


def check_graph(
    checkpoint: Checkpoint, module: nn.Module, model: ir.Model, job: Job, reader: Reader, *, runs: bool
) -> Verified:
    """Have the file of ``model`` read by ``reader``, and where it ``runs`` run, and return what was found.

    It is held against the file that it was made from, which runs here in the same runtime. Raises RepfuseError, with
    the exit code of a failed check, where it holds or computes something else.
    """
    from repfuse.checkpoint.onnx_graph.reading import held, shapes_said  # onnx takes a second to import

    started = time.perf_counter()
    trials, exact, own, problem = _of_original(checkpoint, job) if runs else ([], [], [], "")
    reader.ask(job, trials)
    answer, tensors = reader.answer(), digests(held(model))
    _compare_tensors(tensors, answer.network.tensors)
    runtime = problem or answer.runtime
    numbers: tuple[float | None, float | None, float | None] = (None, None, None)
    if trials:
        measured = drift(checkpoint.module, module, trials, exact, found=answer.outcomes, own=own)
        if not measured.measured:
            runtime = f"not judged: {measured.problem}"
        elif not measured.passed or measured.worst is None:
            raise _wrong("What was written does not compute in ONNX Runtime what the original does there", measured)
        else:
            numbers = measured.worst.numbers
    shapes, labels = tuple(shapes_said(model).values()), tuple(trial.label for trial in trials)
    found = Verified(runtime, shapes, labels, (), *numbers, where=reader.name, tensors=len(tensors))
    return replace(found, seconds=time.perf_counter() - started)


def _of_original(checkpoint: Checkpoint, job: Job) -> tuple[list[Trial], list[Outcome], list[Outcome], str]:
    """Return the trials that the original takes, with its outcomes in float64 and in ONNX Runtime.

    Raises RepfuseError where the two are further apart than half of the digits: then the file was misread. Less is the
    runtime's own affair, which folds norms in the file's dtype and sums in another order: its mean of 12,544 pixels,
    one after the other, is 20 times further off than torch's. Where ONNX Runtime does not run it here, there are no
    trials; why comes last.
    """
    original = checkpoint.module
    tried, expected = with_fallbacks(original, input_variants(checkpoint.example_inputs))
    give_back(original)
    try:
        run_file = onnx_file.runner(checkpoint.path, job.outputs)
        both = zip(tried, expected, strict=True)
        found = [outcome if outcome.error else run_file(trial.inputs) for trial, outcome in both]
        del run_file  # its session holds the weights
    except RepfuseError as error:
        return [], [], [], f"not run, since {onnx_file.runtime_name()} does not take the original: {error.why}"
    taken = [index for index, outcome in enumerate(found) if not outcome.error]
    if not taken:
        return [], [], [], f"not run, since {onnx_file.runtime_name()} does not run the original: {found[0].error}"
    trials = [tried[index] for index in taken]
    exact, own = ([each[index] for index in taken] for each in (expected, found))
    effect = RoundingEffects(original, original, trials, exact, exact)
    measured = drift(original, original, trials, exact, found=own, effect=effect)
    far = any(each.fused.max > half_the_digits(getattr(torch, each.dtype)) for each in measured.outputs)
    if measured.measured and not measured.passed and (measured.problem or far):
        raise _wrong("The file was not understood: ONNX Runtime computes something else of it", measured)
    return trials, exact, own, ""


def _wrong(what: str, measured: Drift) -> RepfuseError:
    return RepfuseError(
        f"{what}; nothing was kept.",
        measured.reason,
        "Please report it, with the file if you can.",
        exit_code=EXIT_FAILED_CHECK,
    )
