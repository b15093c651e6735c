"""Writing a network as an exported program or as ONNX: exported, written, read back, run, and only then counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repfuse.checking.runs import as_stored, call, copy_with
from repfuse.checkpoint import onnx_file
from repfuse.checkpoint.exported import archive
from repfuse.checkpoint.exported.contract import contract_of
from repfuse.checkpoint.exported.exporting import program_like, program_of
from repfuse.checkpoint.readback import compare, not_the_same
from repfuse.errors import RepfuseError
from repfuse.readback.checking import Check
from repfuse.readback.messages import Job, Kind
from repfuse.readback.programs import WrittenProgram, check_program


@dataclass(frozen=True)
class Source:
    """What is written and what it came from: the networks before and after, and the program, where that was one."""

    original: nn.Module
    fused: nn.Module
    example: Sequence[Tensor]
    program: ExportedProgram | None


def write_pt2(source: Source, path: Path) -> tuple[list[str], Check]:
    """Write ``source`` as .pt2; return what the user must be told of the file, and what reads it again.

    Raises RepfuseError where it cannot be exported, or where the file is not the program.
    """
    program = _program(source)
    archive.write(program, path)
    back = archive.read(path, trust=True)  # it was written just now
    compare(program.state_dict, back.state_dict)
    if contract_of(program) != contract_of(back):
        raise not_the_same("its dynamic shapes")
    return _notes(source, program, path), partial(check_program, _written(source, program), _job("pt2", path))


def write_onnx(source: Source, path: Path) -> tuple[list[str], Check]:
    """Write ``source`` as ONNX; return what ``write_pt2`` does. Raises as it does."""
    program = _program(source)
    onnx_file.write(program, path)
    outputs = call(copy_with(source.original, as_stored), tuple(source.example)).outputs
    return [], partial(check_program, _written(source, program), _job("onnx", path, tuple(outputs)))


def _job(kind: Kind, path: Path, outputs: tuple[str, ...] = ()) -> Job:
    return Job(kind, str(path.resolve()), torch.get_num_threads(), outputs=outputs)


def _written(source: Source, program: ExportedProgram) -> WrittenProgram:
    return WrittenProgram((source.original, source.fused), source.example, program)


def _program(source: Source) -> ExportedProgram:
    if source.program is None:
        return program_of(source.fused, source.example)
    if source.fused is source.original:
        return source.program
    return program_like(source.program, source.fused)


def _notes(source: Source, program: ExportedProgram, path: Path) -> list[str]:
    notes = []
    try:
        archive.check(path, path.read_bytes())
    except RepfuseError as error:
        notes.append(f"this file needs --trust: {error.why}")
    before = source.program
    if before is not None and before.dialect != program.dialect:
        notes.append(
            f"the program is in torch.export's {program.dialect} dialect, where the input was {before.dialect}"
        )
    return notes
