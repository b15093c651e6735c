"""Writing a network as an exported program or as ONNX: exported, written, read back, run, and only then counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.export import ExportedProgram

from repfuse.checkpoint import onnx_file
from repfuse.checkpoint.exported import archive
from repfuse.checkpoint.exported.contract import contract_of
from repfuse.checkpoint.exported.exporting import program_like, program_of
from repfuse.checkpoint.writing import compare, not_the_same
from repfuse.errors import RepfuseError

ONE_SIZE = "the file takes the size of the example alone: at others, ONNX would not compute what the network does"


@dataclass(frozen=True)
class Source:
    """What is written and what it came from: the networks before and after, and the program, where that was one."""

    original: nn.Module
    fused: nn.Module
    example: Sequence[Tensor]
    program: ExportedProgram | None


def write_pt2(source: Source, path: Path) -> tuple[ExportedProgram, list[str]]:
    """Write ``source`` as .pt2; return the program that was written, and what the user must be told of the file.

    Raises RepfuseError where it cannot be exported, or where the file is not the program.
    """
    program = _program(source)
    archive.write(program, path)
    back = archive.read(path, trust=True)  # it was written just now
    compare(program.state_dict, back.state_dict)
    if contract_of(program) != contract_of(back):
        raise not_the_same("its dynamic shapes")
    return program, _notes(source, program, path)


def write_onnx(source: Source, path: Path, *, sizes: bool = True) -> tuple[ExportedProgram, list[str]]:
    """Write ``source`` as ONNX; return what ``write_pt2`` does. Raises as it does.

    Without ``sizes`` it takes the sizes of the example alone, in any batch: the exporter writes some operators for the
    size that it sees, and says so nowhere.
    """
    program = _program(source) if sizes else program_of(source.fused, source.example, sizes=False)
    onnx_file.write(program, path)
    return program, [] if sizes else [ONE_SIZE]


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
