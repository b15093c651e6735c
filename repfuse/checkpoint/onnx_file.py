"""Writing ONNX files, and running them in ONNX Runtime. Needs the extra ``onnx``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.checking.runs import Outcome
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError, failing_as, quietly
from repfuse.wording import described, first_line

NEEDED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
LARGEST = 2_000_000_000  # bytes: a protobuf message ends at 2 GiB, and the graph is part of it


def check_installed() -> None:
    """Raise RepfuseError where a package that this format needs is missing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise RepfuseError(
            "ONNX files need packages that are not installed.",
            f"Missing: {', '.join(missing)}.",
            "Install them: pip install 'repfuse[onnx]'.",
        )


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write ``program`` as one ONNX file. Raises RepfuseError where it cannot be expressed, OSError for a disk."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > LARGEST:
        raise RepfuseError(
            "The network is too large for one ONNX file.",
            f"Its weights take {size / 1e9:.1f} GB, and such a file holds 2 GB.",
            "Choose --format pt2 or safetensors.",
        )
    what, hint = "The network cannot be exported to ONNX.", "Choose --format pt2 or safetensors."
    with failing_as(what, hint, EXIT_FAILED_CHECK, why=_cause), quietly():
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    exported.save(str(path), external_data=False)


def _cause(error: BaseException) -> str:
    """Return the first of a chain of errors as text: the exporter's own only says that a step failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return described(error)


def runtime_name() -> str:
    """Return the runtime and its version."""
    return f"ONNX Runtime {importlib.import_module('onnxruntime').__version__}"


class OfFile(nn.Module):
    """A network, and the file at ``path`` that holds it: what a runtime is given of it."""

    def __init__(self, network: nn.Module, path: Path) -> None:
        super().__init__()
        self.network, self.path = network, path

    def forward(self, *inputs: Tensor) -> Any:
        """Run the network."""
        return self.network(*inputs)


def runner(path: Path, names: Sequence[str]) -> Callable[[tuple[Any, ...]], Outcome]:
    """Return what runs the file on tensors; ``names`` are those of its outputs in the original.

    Raises RepfuseError where ONNX Runtime does not load the file.
    """
    what = "ONNX Runtime does not load what was written; nothing was kept."
    with failing_as(what, "Choose --format pt2 or safetensors.", EXIT_FAILED_CHECK, why=first_line):
        started = session(str(path))
    return lambda inputs: _run(started, inputs, names)


def session(model: str | bytes, threads: int = 0) -> Any:
    """Return a session of ONNX Runtime, on the CPU, of a model or of the one at a path.

    0 threads are as many as it likes. Raises what ONNX Runtime does where it does not load it.
    """
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads  # what it refuses is said once, by us
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: tuple[Any, ...], names: Sequence[str]) -> Outcome:
    try:
        pairs = zip(session.get_inputs(), inputs, strict=True)
        fed = {slot.name: tensor.detach().cpu().numpy() for slot, tensor in pairs}
        outputs = [torch.from_numpy(array) for array in session.run(None, fed)]
        return Outcome(dict(zip(names, outputs, strict=True)))
    except Exception as error:  # it has an exception class per status, and no common one
        return Outcome({}, described(error))
