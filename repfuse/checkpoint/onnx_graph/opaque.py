"""Nodes that torch has no function for: run one by one, in ONNX Runtime or as ONNX itself defines them.

What they do is not looked at: a recording sees a tensor that comes from nowhere, which is a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from repfuse.checkpoint import onnx_file
from repfuse.checkpoint.onnx_graph.operators import DTYPES, Function
from repfuse.checkpoint.onnx_graph.reading import array_of, tensor_of

NUMBER_OF = {dtype: number for number, dtype in DTYPES.items()}


class _NoFloat64(Exception):
    """ONNX Runtime does not run a node in float64."""


class Unseen(nn.Module):
    """An operation that a recording does not look into."""

    def forward(self, *inputs: Tensor | None) -> Any:
        """Do it."""
        with torch._C.DisableTorchFunction():
            return self.compute(*inputs)

    def compute(self, *inputs: Tensor | None) -> Any:
        """Return what the operation gives."""
        raise NotImplementedError


class Kept(Unseen):
    """What torch has a ``function`` for, and stays a node of its own for the sake of runtimes."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def compute(self, *inputs: Tensor | None) -> Any:
        """Compute the node."""
        return self.function(*inputs)


class Sizes(nn.Module):
    """``Shape``: the sizes of a tensor, as a tensor. It reads no number of it, which a recording sees."""

    def __init__(self, start: int = 0, end: int | None = None) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, x: Tensor) -> Tensor:
        """Return the sizes."""
        with torch._C.DisableTorchFunction():
            sizes = list(x.shape[self.start : self.end])
        return torch.tensor(sizes, dtype=torch.int64)


class Reshaped(Unseen):
    """``Reshape`` to a shape that is computed."""

    def compute(self, *inputs: Tensor | None) -> Tensor:
        """Return the tensor in its new shape; a size of 0 stands for the one that it has."""
        x, shape = inputs
        assert x is not None and shape is not None
        wanted = [x.shape[axis] if n == 0 else n for axis, n in enumerate(shape.tolist())]
        return x.reshape(wanted).clone()


class Node(Unseen):
    """Any other node, ``proto`` with all that it needs of its model: ``opsets`` and ``functions``.

    ``inputs`` and ``outputs`` are the names of what it takes and gives; what its subgraphs take from outside is among
    the inputs. ONNX Runtime has few operators in float64: of a model in it (``wide``), what that lacks is run as ONNX
    defines it, by the reference; of any other, in float32, and the node is ``narrow`` from then on.
    """

    def __init__(
        self,
        proto: bytes,
        opsets: dict[str, int],
        functions: Sequence[bytes],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        wide: bool,
    ) -> None:
        super().__init__()
        self.wide, self.narrow = wide, False
        self.proto, self.functions = proto, tuple(functions)
        self.opsets, self.inputs, self.outputs = tuple(opsets.items()), tuple(inputs), tuple(outputs)

    def compute(self, *inputs: Tensor | None) -> Any:
        """Run the node."""
        try:
            return self._run(inputs)
        except _NoFloat64:
            self.narrow = True
            found = self._run([x.float() if x is not None and x.dtype is torch.float64 else x for x in inputs])
            return tree_map(lambda x: x.double() if x.dtype is torch.float32 else x, found)

    def _run(self, inputs: Sequence[Tensor | None]) -> Any:
        given = {name: x for name, x in zip(self.inputs, inputs, strict=True) if x is not None}
        numbers = tuple((name, NUMBER_OF[x.dtype]) for name, x in given.items())
        fed = {name: array_of(x) for name, x in given.items()}
        model = _model(self.proto, self.opsets, self.functions, numbers, self.outputs)
        try:
            found = _session(model).run(None, fed)
        except Exception as error:  # it has no class for its errors
            if not self.wide and torch.float64 in {x.dtype for x in given.values()}:
                raise _NoFloat64 from error
            found = _reference(model).run(None, fed)
        tensors = [tensor_of(np.asarray(array)) for array in found]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


@lru_cache(maxsize=1024)
def _model(
    proto: bytes,
    opsets: tuple[tuple[str, int], ...],
    functions: tuple[bytes, ...],
    inputs: tuple[tuple[str, int], ...],
    outputs: tuple[str, ...],
) -> bytes:
    node = onnx.NodeProto.FromString(proto)
    taken = [onnx.helper.make_tensor_value_info(name, number, None) for name, number in inputs]
    given = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph([node], "node", taken, given)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
    known = [onnx.FunctionProto.FromString(function) for function in functions]
    model = helper.make_model(graph, opset_imports=imports, functions=known)
    model.ir_version = min(model.ir_version, 10)
    return bytes(model.SerializeToString())


@lru_cache(maxsize=1024)
def _session(model: bytes) -> Any:
    return onnx_file.session(model, threads=1)


@lru_cache(maxsize=1024)
def _reference(model: bytes) -> ReferenceEvaluator:
    return ReferenceEvaluator(onnx.ModelProto.FromString(model))
