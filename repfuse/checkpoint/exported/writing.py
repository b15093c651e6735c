"""Writing a network as an exported program or as ONNX: exported, written, read back, run, and only then counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repfuse.checkpoint import onnx_file
from repfuse.checkpoint.exported import archive
from repfuse.checkpoint.exported.contract import contract_of
from repfuse.checkpoint.exported.exporting import program_like, program_of
from repfuse.checkpoint.exported.network import complete, network_of
from repfuse.checkpoint.saving import compare, not_the_same
from repfuse.errors import RepfuseError
from repfuse.verifying.copies import as_stored, call, copy_with
from repfuse.verifying.results import Verified
from repfuse.verifying.written import Runtime, check_written


@dataclass(frozen=True)
class Source:
    """What is written and what it came from: the networks before and after, and the program, where that was one."""

    original: nn.Module
    fused: nn.Module
    example: Sequence[Tensor]
    program: ExportedProgram | None


def write_pt2(source: Source, path: Path) -> tuple[Verified, list[str]]:
    """Write ``source`` as .pt2; return what was verified of the file, and what the user must be told of it.

    Raises RepfuseError where it cannot be exported, or where the file is not the network.
    """
    program = _program(source)
    archive.write(program, path)
    back = archive.read(path, trust=True)  # it was written just now
    compare(program.state_dict, back.state_dict)
    if contract_of(program) != contract_of(back):
        raise not_the_same("its dynamic shapes")
    network = network_of(complete(back, path))
    runtime = f"torch.export, PyTorch {torch.__version__}"
    return _check(source, back, lambda inputs: call(network, inputs), runtime), _notes(source, program, path)


def write_onnx(source: Source, path: Path) -> Verified:
    """Write ``source`` as ONNX; return what was verified of the file in ONNX Runtime. Raises as ``write_pt2``."""
    program = _program(source)
    onnx_file.write(program, path)
    outputs = call(copy_with(source.original, as_stored), tuple(source.example)).outputs
    return _check(source, program, onnx_file.runner(path, list(outputs)), onnx_file.runtime_name())


def _program(source: Source) -> ExportedProgram:
    if source.program is None:
        return program_of(source.fused, source.example)
    if source.fused is source.original:
        return source.program
    return program_like(source.program, source.fused)


def _check(source: Source, program: ExportedProgram, run: Runtime, runtime: str) -> Verified:
    gate = network_of(complete(program, Path()))
    shapes = tuple("x".join(map(str, axes)) for axes in contract_of(program).axes)
    networks = (source.original, source.fused)
    return check_written(networks, source.example, run, shapes=(gate, shapes), runtime=runtime)


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
