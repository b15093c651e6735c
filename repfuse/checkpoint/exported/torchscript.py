"""Reading TorchScript archives, through PyTorch's converter to exported programs.

``torch.jit.load`` runs no Python of the file: it has its own unpickler, and the code in the archive is TorchScript,
which is interpreted. But that interpreter runs the file's ``__setstate__`` methods while it loads, and TorchScript may
call any registered operator, such as ``aten::save`` and ``aten::from_file``, which write and map files. So loading one
runs code of the file, and needs ``--trust``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repfuse.checking.drift import check_written
from repfuse.checking.runs import call
from repfuse.checkpoint import example
from repfuse.checkpoint.exported.program import network_of
from repfuse.checkpoint.exported.writing import doubled
from repfuse.checkpoint.recognise import damaged
from repfuse.checkpoint.shapes import Shape
from repfuse.errors import RepfuseError
from repfuse.preconditions import quantised
from repfuse.quiet import quietly
from repfuse.wording import described, first_line

ADVICE = (
    "Export the network from Python instead: torch.export.save(torch.export.export(model, inputs), 'model.pt2'), or "
    "torch.save(model, 'model.pt')."
)

QUANTISED = re.compile(r"(?P<aware>aten::\w*fake_quant)|quantized::(?!\w*dynamic)")
"""Operators of int8, and of the way there. A layer that is dynamically quantised leaves the others as they are."""


def read(path: Path, shapes: Sequence[Shape] | None, *, trust: bool) -> ExportedProgram:
    """Return the network of the archive as an exported program; ``shapes`` are those of its inputs.

    Raises RepfuseError where it is not trusted, damaged or quantised (which the converter would undo), where the shapes
    are not given, or where the converter fails or gives a network that computes something else.
    """
    if not trust:
        raise RepfuseError(
            f"{path} is a TorchScript archive, which runs code of its own while it is loaded.",
            "TorchScript may call any operator of PyTorch, also those that write files.",
            "If you trust whoever made it, use --trust. " + ADVICE,
        )
    if shapes is None:
        raise RepfuseError(f"The input of {path} is not known.", "TorchScript does not say it.", "Give it: --input.")
    script = _load(path)
    if found := QUANTISED.search(str(script.inlined_graph)):
        raise quantised(str(path), aware=found["aware"] is not None)
    inputs = example.make_inputs(shapes, script)
    program = _convert(path, script, inputs)
    _check(path, script, program, inputs)
    return program


def _load(path: Path) -> torch.jit.ScriptModule:
    try:
        with quietly():
            script: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return script.eval()
    except Exception as error:  # a damaged archive can make its reader fail in any way
        raise damaged(path, first_line(error)) from error


def _convert(path: Path, script: torch.jit.ScriptModule, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    try:
        from torch._export.converter import TS2EPConverter

        with quietly():
            program: ExportedProgram = TS2EPConverter(script, doubled(inputs), {}).convert()
    except Exception as error:  # the converter raises what it likes, and goes away in some later version
        why = f"PyTorch's converter fails: {described(error)}"
        raise RepfuseError(f"The TorchScript of {path} cannot be converted.", why, ADVICE) from error
    program.example_inputs = (inputs, {})
    return program


def _check(path: Path, script: nn.Module, program: ExportedProgram, inputs: tuple[Any, ...]) -> None:
    network = network_of(program)
    try:
        run = lambda trials: ("", [call(script, trial.inputs) for trial in trials])  # noqa: E731
        check_written(network, network, inputs, run, gate=network)
    except RepfuseError as error:
        what = f"PyTorch's converter does not give the network of {path}."
        raise RepfuseError(what, error.why, ADVICE) from error
