"""ONNX file -> the graph in it, as ``onnx_ir`` holds it. What cannot be merged or run is refused here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor

from repfuse.checkpoint.formats import damaged
from repfuse.checkpoint.onnx_graph import operators
from repfuse.checkpoint.onnx_graph.operators import DTYPES
from repfuse.checkpoint.spec import Shape
from repfuse.errors import RepfuseError
from repfuse.networks import USUAL_SIZE, quantised
from repfuse.wording import dtype_name, listed

DOMAINS = ("", "ai.onnx")
OLDEST = 7  # before it, broadcasting was something else
LISTS_NO_WEIGHTS = 4  # the version of the format from which on weights are no inputs
USUAL_CHANNELS = 3
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinear")


def read(path: Path) -> ir.Model:
    """Return the model in the file at ``path``; tensors in files beside it stay there.

    Raises RepfuseError where it is quantised, or not a graph of tensors; at a damaged file it raises anything.
    """
    model = ir.load(path)
    if not model.graph.outputs or not len(model.graph):
        what, hint = f"{path} holds no network.", "Give the file that holds the whole graph."
        raise RepfuseError(what, "Its graph has no nodes, or gives nothing.", hint)
    kinds = [node.op_type for node in model.graph]
    if any(kind.startswith(QUANTISED) for kind in kinds):
        raise quantised(str(path), aware=False)
    if (version := version_of(model)) < OLDEST:
        raise RepfuseError(
            f"{path} is of opset {version}.",
            f"repfuse reads opset {OLDEST} and later.",
            "Convert it first: onnx.version_converter.convert_version(model, 17).",
        )
    for value in (*inputs_of(model), *model.graph.outputs):
        if not isinstance(value.type, ir.TensorType):
            what, why = f"{value.name!r} of {path} is no tensor.", "repfuse merges networks of tensors alone."
            raise RepfuseError(what, why, "Export the network so that it takes and gives tensors.")
    for name, tensor in tensors_of(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(name, tensor, path)
        if int(tensor.dtype) not in DTYPES:
            what = f"The tensor {name!r} of {path} is of {tensor.dtype.name}."
            why = "That has no numbers, or other ones than torch computes with."
            raise RepfuseError(what, why, "Convert the float model that it was made from.")
    return model


def _check_external(name: str, tensor: ir.ExternalTensor, path: Path) -> None:
    """Raise RepfuseError where a tensor is said to be in a file that is not there, or not beside the model."""
    said = str(tensor.location)
    parts = {*PurePosixPath(said).parts, *PureWindowsPath(said).parts}
    if PurePosixPath(said).is_absolute() or PureWindowsPath(said).is_absolute() or ".." in parts:
        what = f"{path} says that {name!r} is in {said}, outside of its folder."
        raise RepfuseError(what, "A model has no business there.", "Do not use this file, unless you wrote it.")
    held = path.parent / said
    if not held.is_file():
        what = f"{path} has its weights in {said}, which is not there."
        raise RepfuseError(what, "The two belong together.", f"Put {said} beside it.")
    end = (tensor.offset or 0) + (tensor.length or 0)
    if held.stat().st_size < end or (tensor.length is not None and tensor.length != tensor.nbytes):
        raise damaged(held, f"{name!r} should end at byte {end:,}, and the file has {held.stat().st_size:,}")


def version_of(model: ir.Model) -> int:
    """Return the version of ONNX's own operators."""
    return next((model.opset_imports[name] for name in DOMAINS if name in model.opset_imports), 1)


def inputs_of(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that have no default: before version 4 of the format, every weight was listed as an input."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def tensors_of(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield the tensors in the graph itself: its initialisers, by their names."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            what, why = f"The tensor {name!r} has no numbers.", "The file was written without them."
            raise RepfuseError(what, why, "Give the file that holds the weights, too.")
        yield name, value.const_value


def shapes_of(path: Path) -> dict[str, operators.Shape]:
    """Return the shapes of all values, by name, as far as they can be told before the network runs.

    What the file says of them is put aside where ONNX itself can tell: it follows sizes that are computed, too, where
    whatever wrote the file may have given them names that are nobody else's.
    """
    model, said = ir.load(path), dict[str, operators.Shape]()
    values = [value for node in model.graph for value in node.outputs]
    for value in values:
        node = value.producer()
        if value.shape is not None and node is not None and node.domain in DOMAINS:
            said[str(value.name)] = tuple(n if isinstance(n, int) else None for n in value.shape.dims)
            value.shape = None
    with suppress(Exception):  # what it does not know stays unknown
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
    found = {str(value.name): value.shape for value in (*model.graph.inputs, *values) if value.shape is not None}
    sizes = {name: tuple(n if isinstance(n, int) else n.value for n in shape.dims) for name, shape in found.items()}
    held = {name: tuple(map(int, tensor.shape.numpy())) for name, tensor in tensors_of(model)}
    return {**said, **sizes, **held}


def files_of(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Return the files beside the model that hold its tensors."""
    held = (tensor.location for _, tensor in tensors_of(model) if isinstance(tensor, ir.ExternalTensor))
    return tuple(path.parent / location for location in dict.fromkeys(map(str, held)))


def example_of(model: ir.Model) -> tuple[tuple[Shape, ...], bool]:
    """Return an example of the shapes that a model takes, and whether sizes other than the batch are free."""
    found, is_open = [], False
    for value in inputs_of(model):
        dims = value.shape.dims if value.shape is not None else (None,) * 4
        is_open = is_open or not all(isinstance(n, int) for n in dims[1:])
        usual = (1, USUAL_CHANNELS, *(USUAL_SIZE.get(len(dims) - 2, 1),) * (len(dims) - 2))
        sizes = (n if isinstance(n, int) else usual[axis] for axis, n in enumerate(dims))
        assert value.dtype is not None
        found.append(Shape(tuple(sizes), dtype_name(DTYPES[int(value.dtype)])))
    return tuple(found), is_open


def notes_on(model: ir.Model) -> tuple[str, ...]:
    """Return what the user must be told of a model."""
    given = [str(value.name) for value in model.graph.inputs if value.name in model.graph.initializers]
    note = f"weights that are also inputs are no constants, and nothing is merged with them: {listed(given)}"
    return (note,) if given and (model.ir_version or 0) >= LISTS_NO_WEIGHTS else ()


def held(model: ir.Model) -> dict[str, Tensor]:
    """Return the tensors of the graph by name."""
    return {name: tensor_of(tensor.numpy()) for name, tensor in tensors_of(model)}


def shapes_said(model: ir.Model) -> dict[str, str]:
    """Return what the file says of its inputs, as text by name: nx3x224x224."""
    said = {}
    for value in inputs_of(model):
        dims = value.shape.dims if value.shape is not None else ("...",)
        said[str(value.name)] = "x".join(str(n if isinstance(n, int | str) else n.value or "?") for n in dims)
    return said


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor over the memory of an array: what is in a file beside the model stays there until it is read."""
    held = np.ascontiguousarray(array).reshape(array.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nobody may write there: nobody does
        if held.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(held.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(held)


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return an array over the memory of a tensor."""
    held = tensor.detach().cpu().contiguous()
    if held.dtype is torch.bfloat16:
        return held.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return held.numpy()
