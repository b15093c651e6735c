"""A file of an exported program or of ONNX, run in its own runtime and held against the original network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.export import ExportedProgram

from repfuse.checking.results import Verified
from repfuse.checking.runs import Outcome, as_stored, call, copy_with
from repfuse.checking.trial import Trial
from repfuse.checking.written import check_written
from repfuse.checkpoint.exported.program import complete, contract_of, network_of
from repfuse.readback.checking import Written, not_the_same, patience
from repfuse.readback.messages import Answer, FileKind, Job, digests
from repfuse.readback.process import Reader


def program_job(written: Written, path: Path, *, onnx: bool) -> Job:
    """Return the job of running the file at ``path``. ONNX names no outputs: they are those of the original."""
    kind: FileKind = "onnx" if onnx else "pt2"
    outputs = call(copy_with(written.original, as_stored), tuple(written.example)).outputs if onnx else {}
    return Job(kind, str(path.resolve()), torch.get_num_threads(), outputs=tuple(outputs))


def check_program(written: Written, program: ExportedProgram, job: Job, reader: Reader, *, runs: bool) -> Verified:
    """Have the file of ``program`` read by ``reader``, and where it ``runs`` run, and return what was found.

    Raises RepfuseError, with the exit code of a failed check, where it does not compute what the original does.
    """
    started = time.perf_counter()
    tensors = digests(program.state_dict) if job.kind == "pt2" else {}

    def run(trials: Sequence[Trial]) -> tuple[str, Sequence[Outcome]]:
        reader.ask(replace(job, inputs=tuple(trial.inputs for trial in trials)))
        answer = reader.answer(patience(Path(job.path), time.perf_counter() - started))
        if job.kind == "pt2":
            _compare(answer, tensors, program)
        return answer.runtime, answer.outcomes

    if not runs:
        return Verified(run(())[0], (), (), ())
    gate = network_of(complete(program, Path()))
    shapes = tuple("x".join(map(str, axes)) for axes in contract_of(program).axes)
    found = check_written(written.original, written.module, written.example, run, gate=gate, shapes=shapes)
    return replace(found, where=reader.name, tensors=len(tensors), seconds=time.perf_counter() - started)


def _compare(answer: Answer, tensors: dict[str, str], program: ExportedProgram) -> None:
    """Raise RepfuseError where what was read is not what was written, bit by bit."""
    read = answer.network.tensors if answer.network else {}
    if wrong := sorted(name for name, _ in tensors.items() ^ read.items()):
        raise not_the_same(wrong[0])
    if answer.contract != contract_of(program).describe():
        raise not_the_same("its dynamic shapes")
