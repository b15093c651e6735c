"""A rewritten module as edits of the graph that it was read from: what it still calls stays, word for word."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.padding import _CircularPadNd, _ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd

from repfuse.checkpoint import onnx_file
from repfuse.checkpoint.onnx_graph.network import Building, captured, unique
from repfuse.checkpoint.onnx_graph.reading import LISTS_NO_WEIGHTS, array_of, read, tensor_of, tensors_of, version_of
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.networks import equal
from repfuse.wording import first_line

MODES: dict[Any, str] = {
    _ConstantPadNd: "constant",
    _ReflectionPadNd: "reflect",
    _ReplicationPadNd: "edge",
    _CircularPadNd: "wrap",
}
PADDING_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
COMBINING: dict[Any, str] = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", torch.cat: "Concat"}
PADS_AS_INPUT = 11  # the opset from which on Pad is told its amounts by an input


def edited(path: Path, module: nn.Module) -> ir.Model:
    """Return the model in the file at ``path`` as ``module`` was rewritten, which was read from it."""
    return _Editing(path, module).run().model


def with_numbers_of(file: Path, path: Path, module: nn.Module) -> bool:
    """Give ``module``, which was read from the file at ``path`` and rewritten, the merged numbers in another ``file``.

    False where that holds another graph than would be written of it, or other numbers beside what was merged.
    """
    editing, held = _Editing(path, module).run(), read(file)
    made = editing.model
    if _form(made) != _form(held):
        return False
    for name, tensor in tensors_of(held):
        numbers, known = tensor_of(tensor.numpy()), editing.tensors.get(name)
        if known is None:
            stays = made.graph.initializers[name].const_value
            if stays is None or not equal(tensor_of(stays.numpy()), numbers):
                return False
        elif isinstance(known, nn.Parameter):
            known.data = numbers
        else:
            known.detach().copy_(numbers)
    return True


def _form(model: ir.Model) -> list[Any]:
    """Return all of a graph but the numbers of its initialisers."""
    held = sorted((name, tensor.dtype, tuple(tensor.shape.numpy())) for name, tensor in tensors_of(model))
    ends = [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)]
    return [dict(model.opset_imports), ends, held, [ir.to_proto(node).SerializeToString() for node in model.graph]]


class _Editing:
    """Walks the lines of the module, which was read from the file at ``path``. ``values`` are the values of the graph
    that they stand for, ``tensors`` are those of the module that became initialisers, by their names.
    """

    def __init__(self, path: Path, module: nn.Module) -> None:
        assert isinstance(module, fx.GraphModule)
        self.module, self.model = module, read(path)
        self.parts, self.graph = Building(self.model, path, bare=True), self.model.graph
        self.parts.build()
        self.values: dict[Any, ir.Value] = {}
        self.read: dict[Any, list[ir.Value]] = {}
        self.kept: set[ir.Node] = set()
        self.new: list[ir.Node] = []
        self.replaced: dict[ir.Value, ir.Value] = {}
        self.made: set[ir.Value] = set()
        nodes = list(self.graph.all_nodes())
        self.names = {str(node.name) for node in nodes} | {str(x.name) for node in nodes for x in node.outputs}
        for graph in self.model.graphs():
            self.names |= {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
        self.tensors: dict[str, Tensor] = {}

    def run(self) -> _Editing:
        """Make the edits."""
        before = list(self.graph)
        read = [node for node in before if not _is_unread(node)]
        used = [value for value in self.graph.initializers.values() if value.uses()]
        for line in self.module.graph.nodes:
            self._follow(line)
        moved = any(self._differ(old, new) for old, new in self.replaced.items())
        for old, new in self.replaced.items():
            self._replace(old, new)
        self.graph.extend(self.new)
        self.graph.remove([node for node in before if node not in self.kept], safe=True)
        for value in (value for node in self.graph for value in node.outputs if moved):
            if not value.is_graph_output():  # what rearranges values stays, and what it gives may have other channels
                value.shape = None
        self._remove_unread(read, used)
        if (self.model.ir_version or 0) < LISTS_NO_WEIGHTS:  # the new ones are no inputs
            self.model.ir_version = LISTS_NO_WEIGHTS
            for value in self.graph.initializers.values():
                if value.is_graph_input():
                    self.graph.inputs.remove(value)
        return self

    def _remove_unread(self, nodes: list[ir.Node], tensors: list[ir.Value]) -> None:
        """Remove what only that has read which is gone: to take a shape from, say."""
        for node in reversed(nodes):
            if node in self.kept and _is_unread(node):
                self.graph.remove(node, safe=True)
        for value in tensors:
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[str(value.name)]
                if value.is_graph_input():
                    self.graph.inputs.remove(value)

    def _differ(self, old: ir.Value, new: ir.Value) -> bool:
        """Whether another shape stands in the place of one; of a new layer, other channels."""
        if new not in self.made:
            return old.shape is not None and new.shape is not None and old.shape != new.shape
        node = new.producer()
        bias = None if node is None or len(node.inputs) < 2 else node.inputs[-1]
        return old.shape is not None and bias is not None and bias.shape is not None and bias.shape[-1] not in old.shape

    def _follow(self, line: fx.Node) -> None:
        target = str(line.target)
        if line.op == "placeholder":
            self.values[line] = self.parts.inputs[target]
        elif line.op == "get_attr" and target in self.parts.tensors:
            self.values[line] = self._kept_tensor(self.parts.tensors[target], getattr(self.module, target))
        elif line.op == "call_module" and target in self.parts.nodes:
            self._keep(line, self.parts.nodes[target])
        elif line.op == "call_module" and target in self.parts.passing:
            self.values[line] = self.values[line.args[0]]
        elif line.op == "call_module" and target != self.parts.expected:
            self.values[line] = self._written(self.module.get_submodule(target), self.values[line.args[0]], target)
        elif line.target is operator.getitem and line.args[0] in self.read:
            self.values[line] = self.read[line.args[0]][line.args[1]]  # type: ignore[index]
        elif line.target in COMBINING and line.all_input_nodes[0] in self.values:
            self.values[line] = self._combined(line)
        elif line.op == "output":
            said: Any = line.args[0]
            given = list(said.values()) if isinstance(said, dict) else [said]
            for old, new in zip(self.graph.outputs, given, strict=True):
                self._meet(old, self.values[new])

    @staticmethod
    def _kept_tensor(value: ir.Value, held: Tensor) -> ir.Value:
        """Return an initialiser, with other numbers where the module has others: whatever reads it was rescaled."""
        assert value.const_value is not None
        if not equal(tensor_of(value.const_value.numpy()), held):
            value.const_value = ir.tensor(array_of(held), name=value.name)
        return value

    def _keep(self, line: fx.Node, node: ir.Node) -> None:
        """Leave a node as it is, behind what is new; what it reads may be another value from now on."""
        self.kept.add(node)
        self.graph.insert_before(node, self.new)
        self.new = []
        for old, given in zip([*node.inputs, *captured(node)], line.args, strict=False):
            if old is not None and given in self.values:
                self._meet(old, self.values[given])
        self.read[line] = [value for value in node.outputs if value.name]
        self.values[line] = node.outputs[0]

    def _meet(self, old: ir.Value, new: ir.Value) -> None:
        if old is not new:
            self.replaced[old] = new

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let all that read ``old`` read ``new``, or where that has to keep its name a copy, under the old name."""
        name = old.name
        if new not in self.made:  # it has a name of its own
            for node, place in tuple(old.uses()):  # they may come before the copy
                node.replace_input_with(place, new)
            if not old.is_graph_output():
                return
            new = self._node("Identity", [new], f"{name}_given")
        self.made.discard(new)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.type, new.shape = old.type, old.shape
        old.name = unique(f"{name}_before", self.names)
        new.name = name

    # New nodes

    def _node(self, kind: str, inputs: list[ir.Value], name: str, attributes: dict[str, Any] | None = None) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=unique(name, self.names))
        value = node.outputs[0]
        value.name = unique(f"{name}_output", self.names)
        value.type = inputs[0].type
        self.new.append(node)
        self.made.add(value)
        return value

    def _tensor(self, name: str, held: Tensor | np.ndarray[Any, Any]) -> ir.Value:
        name = unique(name, self.names)
        if isinstance(held, Tensor):
            self.tensors[name] = held
        array = array_of(held) if isinstance(held, Tensor) else held
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def _combined(self, line: fx.Node) -> ir.Value:
        one: Any
        one, other = line.args
        if line.target is torch.cat:
            return self._node("Concat", [self.values[part] for part in one], line.name, {"axis": other})
        x = self.values[one]
        if other in self.values:
            y = self.values[other]
        else:
            assert isinstance(x.type, ir.TensorType)
            y = self._tensor(f"{line.name}_factor", np.array(other, x.type.dtype.numpy()))
        return self._node(COMBINING[line.target], [x, y], line.name)

    def _written(self, module: nn.Module, x: ir.Value, name: str) -> ir.Value:  # noqa: PLR0911 - one for each kind
        """Add the nodes of a module that the rewrite made, and return what they give."""
        if isinstance(module, nn.Sequential):
            *steps, last = module
            if hasattr(module, "ones"):
                x = self._beside_ones(x, module.get_submodule("conv"), f"{name}_ones")
                steps = steps[1:]
            if len(steps) == 1 and isinstance(steps[0], _ConstantPadNd) and min(steps[0].padding) >= 0:
                assert isinstance(last, _ConvNd)
                return self._convolution(last, x, name, _pads(steps[0].padding))
            for number, step in enumerate(steps):
                layer = isinstance(step, _ConvNd | nn.Linear)
                x = self._written(step, x, name if layer else f"{name}_pad{number or ''}")
            return self._written(last, x, f"{name}_norm" if isinstance(last, _BatchNorm) else name)
        if isinstance(module, _BatchNorm):
            leaves = ("weight", "bias", "running_mean", "running_var")
            held = [self._tensor(f"{name}.{leaf}", getattr(module, leaf)) for leaf in leaves]
            return self._node("BatchNormalization", [x, *held], name, {"epsilon": module.eps})
        if isinstance(module, nn.Linear):
            return self._linear(module, x, name)
        if isinstance(module, _ConvNd):
            pads = [int(n) for n in module.padding] * 2
            if module.padding_mode != "zeros":
                x = self._pad(x, PADDING_MODES[module.padding_mode], pads, f"{name}_pad")
                pads = [0] * len(pads)
            return self._convolution(module, x, name, pads)
        if isinstance(module, nn.Identity):
            return x
        mode = next(mode for kind, mode in MODES.items() if isinstance(module, kind))
        return self._pad(x, mode, _pads(module.padding), name)

    def _convolution(self, module: _ConvNd, x: ir.Value, name: str, pads: list[int]) -> ir.Value:
        attributes: dict[str, Any] = {
            "kernel_shape": list(module.kernel_size),
            "strides": list(module.stride),
            "pads": pads,
            "dilations": list(module.dilation),
            "group": module.groups,
        }
        if isinstance(module, _ConvTransposeNd):
            attributes["output_padding"] = list(module.output_padding)
        kind = "ConvTranspose" if isinstance(module, _ConvTransposeNd) else "Conv"
        return self._node(kind, [x, *self._weights(module, name)], name, attributes)

    def _weights(self, module: nn.Module, name: str) -> list[ir.Value]:
        return [self._tensor(f"{name}.{leaf}", held) for leaf, held in module.named_parameters()]

    def _linear(self, module: nn.Linear, x: ir.Value, name: str) -> ir.Value:
        biased = module._parameters["bias"] is not None  # else a norm is behind it
        if biased and len(self.parts.shapes.get(str(x.name), ())) == 2:
            return self._node("Gemm", [x, *self._weights(module, name)], name, {"transB": 1})
        product = self._node("MatMul", [x, self._tensor(f"{name}.weight", module.weight.t())], f"{name}_product")
        if not biased:
            return product
        return self._node("Add", [product, self._tensor(f"{name}.bias", module.bias)], name)

    def _beside_ones(self, x: ir.Value, layer: nn.Module, name: str) -> ir.Value:
        """Put a channel of ones behind the others: a Pad of the channels alone."""
        assert isinstance(layer, _ConvNd)
        rank = len(layer.kernel_size) + 2
        amounts = [int(axis == rank + 1) for axis in range(2 * rank)]
        if version_of(self.model) < PADS_AS_INPUT:
            return self._node("Pad", [x], name, {"pads": amounts, "value": 1.0})
        one = self._tensor(f"{name}.value", layer.weight.new_ones(()))
        return self._node("Pad", [x, self._tensor(f"{name}.amounts", np.array(amounts, np.int64)), one], name)

    def _pad(self, x: ir.Value, mode: str, pads: list[int], name: str) -> ir.Value:
        half = len(pads) // 2
        whole = [0, 0, *pads[:half], 0, 0, *pads[half:]]
        if version_of(self.model) < PADS_AS_INPUT:
            return self._node("Pad", [x], name, {"mode": mode, "pads": whole})
        return self._node("Pad", [x, self._tensor(f"{name}.amounts", np.array(whole, np.int64))], name, {"mode": mode})


def _is_unread(node: ir.Node) -> bool:
    return not any(value.uses() or value.is_graph_output() for value in node.outputs)


def _pads(padding: Any) -> list[int]:
    """Return amounts as ONNX wants them, all befores and then all afters, from torch's, pairs from the last axis on."""
    pairs = list(zip(padding[::2], padding[1::2], strict=True))[::-1]
    return [int(before) for before, _ in pairs] + [int(after) for _, after in pairs]


SMALL = 256  # bytes of a tensor that is not worth a place in another file


def write(model: ir.Model, path: Path, before: Sequence[Path]) -> tuple[Path, ...]:
    """Write the model; return the file beside it that holds its weights, where they are in one.

    That is so where they were in files ``before``, or where they are too large for one file.
    """
    size = sum(tensor.nbytes for _, tensor in tensors_of(model))
    weights = f"{path.name}.data" if before or size > onnx_file.LARGEST else None
    ir.save(model, path, external_data=weights, size_threshold_bytes=SMALL)
    return () if weights is None else (path.parent / weights,)


def check_valid(path: Path, original: Path) -> None:
    """Raise RepfuseError where the file at ``path`` is no valid model, and the one that it was made from is."""
    if (wrong := _invalid(path)) and not _invalid(original):
        what, hint = "What was written is no valid ONNX model; nothing was kept.", "Please report it."
        raise RepfuseError(what, wrong, hint, exit_code=EXIT_FAILED_CHECK)


def _invalid(path: Path) -> str:
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # its own, protobuf's, or of the files beside it
        return first_line(error)
    return ""
