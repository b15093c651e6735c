"""From a network back to an exported program, and to its file.

A program is exported like the one that its network came from, or with every axis dynamic that can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repfuse.checkpoint.exported import archive
from repfuse.checkpoint.exported.program import automatic, contract_of, dims_of, flat_inputs
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.quiet import quietly
from repfuse.recording.copies import changed_copy
from repfuse.wording import described


def program_like(original: ExportedProgram, network: nn.Module) -> ExportedProgram:
    """Export ``network``, which was made of ``original``'s, with its dynamic shapes, guards and input structure.

    Raises RepfuseError where it cannot be exported, or where any of that would change.
    """
    try:
        shapes = dims_of(original)
    except ValueError as error:
        raise _changed(str(error)) from error
    example = list(flat_inputs(original))
    for at, axes in enumerate(shapes):
        for axis in axes:  # torch.export takes one for a constant
            example[at] = torch.cat([example[at]] * 2, axis) if example[at].shape[axis] == 1 else example[at]
    try:
        program = _export(network, tuple(example), shapes)
    except RepfuseError:  # torch wants guards between sizes, which only its automatic dimensions may have
        program = _export(network, tuple(example), automatic(original))
    signature, wanted = program.module_call_graph[0].signature, original.module_call_graph[0].signature
    assert signature is not None and wanted is not None
    signature.in_spec, signature.out_spec = wanted.in_spec, wanted.out_spec
    signature.forward_arg_names = wanted.forward_arg_names
    program.example_inputs = original.example_inputs
    program._guards_code = list(original._guards_code)
    before, after = contract_of(original), contract_of(program)
    if before != after:
        raise _changed(f"they were {before.describe()}, and became {after.describe()}")
    return program


def program_of(network: nn.Module, example: Sequence[Tensor], *, sizes: bool = True) -> ExportedProgram:
    """Export ``network`` with its batch and its spatial axes dynamic, as far as its operators take other sizes.

    Without ``sizes`` the batch alone is. Raises RepfuseError where it cannot be exported.
    """
    batch = example[0].shape[:1]
    ways = [(doubled(example), True), (tuple(example), False)]  # a forward may hold its batch as a number
    for inputs, batched in ways:
        axes = tuple(
            _axes(x, y.shape[:1] == batch and batched, sizes=sizes) for x, y in zip(inputs, example, strict=True)
        )
        with suppress(RepfuseError):
            program = _export(network, inputs, axes)
            if contract_of(program).admits([x.shape for x in example]):
                return program
    return _export(network, tuple(example), None)


def _export(network: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    copied = changed_copy(network, lambda _name, tensor: tensor.clone())  # forward may keep what it is traced with
    try:
        with quietly(), torch.no_grad():
            return torch.export.export(copied, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever a forward may raise
        raise RepfuseError(
            f"{type(network).__name__} cannot be exported with torch.export.",
            described(error),
            "Choose --format pt, state-dict or safetensors.",
        ) from error


def doubled(example: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the example with a batch of two where it has a batch of one: torch.export takes one for a constant."""
    batch = example[0].shape[:1]
    return tuple(torch.cat([x, x]) if batch == (1,) and x.shape[:1] == batch else x for x in example)


def _axes(tensor: Tensor, batched: bool, *, sizes: bool) -> dict[int, Any]:
    axes = {0: Dim.AUTO} if batched else {}
    if sizes and tensor.is_floating_point() and 3 <= tensor.dim() <= 5:
        axes |= dict.fromkeys(range(2, tensor.dim()), Dim.AUTO)
    return axes


def _changed(why: str) -> RepfuseError:
    return RepfuseError(
        "The dynamic shapes of the program cannot be kept.",
        why,
        "Choose --format pt.",
        EXIT_FAILED_CHECK,
    )


def exported(
    original: nn.Module,
    fused: nn.Module,
    example: Sequence[Tensor],
    before: ExportedProgram | None,
    *,
    sizes: bool = True,
) -> ExportedProgram:
    """Return the program of ``fused``, which was made of ``original``; ``before`` is that one's, where it was one.

    Without ``sizes`` it takes the sizes of the example alone, in any batch. Raises RepfuseError where it cannot be
    exported.
    """
    if before is None or not sizes:
        return program_of(fused, example, sizes=sizes)
    return before if fused is original else program_like(before, fused)


def write_pt2(program: ExportedProgram, before: ExportedProgram | None, path: Path) -> list[str]:
    """Write ``program`` as .pt2, in the place of the one ``before``; return what the user must be told of the file."""
    archive.write(program, path)
    notes = []
    try:
        archive.check(path, path.read_bytes())
    except RepfuseError as error:
        notes.append(f"this file needs --trust: {error.why}")
    if before is not None and before.dialect != program.dialect:
        notes.append(
            f"the program is in torch.export's {program.dialect} dialect, where the input was {before.dialect}"
        )
    return notes
