"""The graph of an ONNX file as a module: one call of a child for each node, which functions of torch compute.

The module is an ``fx.GraphModule``, as exported programs are: what is planned and rewritten are its lines, and each
line goes back to its node by the name of the child that it calls.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.traversal import RecursiveGraphIterator
from torch import Tensor, fx, nn

from repfuse.checkpoint.onnx_graph import opaque
from repfuse.checkpoint.onnx_graph.operators import VALUES, Function, Known, Shape, function_of
from repfuse.checkpoint.onnx_graph.reading import DOMAINS, LISTS_NO_WEIGHTS, inputs_of, shapes_of, tensor_of, version_of

SIZES = {"Reshape": 1, "Resize": 3}  # which input is a list of sizes
PASSING = ("Unsqueeze", "Squeeze", "Cast", "Identity")  # of a list of sizes
RANDOM = ("Random", "Bernoulli", "Multinomial")  # whose results are none that stay
FOLDED = 1 << 10  # numbers that a constant may have to be looked for as an argument of an operator
LARGE = 1 << 26
"""As many numbers as a constant may have to be computed at all when a file is read."""


class Operation(nn.Module):
    """A node, as a function of torch."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor | None) -> Any:
        """Compute the node."""
        return self.function(*inputs)


class Expected(opaque.Unseen):
    """What the file says of its inputs: names, and sizes as far as they are fixed."""

    def __init__(self, wanted: Iterable[tuple[str, Shape | None]]) -> None:
        super().__init__()
        self.wanted = tuple(wanted)

    def compute(self, *inputs: Tensor | None) -> None:
        """Raise AssertionError where an input has another size, as an exported program does."""
        for (name, sizes), x in zip(self.wanted, inputs, strict=True):
            assert x is not None
            if sizes is None:
                continue
            pairs = zip(sizes, x.shape, strict=False)
            if len(sizes) != x.dim() or any(isinstance(n, int) and n != m for n, m in pairs):
                said, given = "x".join("?" if n is None else str(n) for n in sizes), "x".join(map(str, x.shape))
                raise AssertionError(f"Guard failed: {name} is {given}, and the file takes {said}")


class Default(opaque.Unseen):
    """A tensor that whoever runs the file may give: the one in the file is no constant."""

    def compute(self, *inputs: Tensor | None) -> Tensor:
        """Return the one in the file."""
        (x,) = inputs
        assert x is not None
        return x.clone()


class Names:
    """Names of children and tensors of a module, for names of ONNX: those may be any text."""

    def __init__(self) -> None:
        self.taken = {*dir(fx.GraphModule), *keyword.kwlist}

    def __call__(self, name: str | None) -> str:
        """Return a name that is not taken yet."""
        base = re.sub(r"[^\w/:-]", "_", name or "node")
        found, number = base, 0
        while found in self.taken:
            number += 1
            found = f"{base}_{number}"
        self.taken.add(found)
        return found


class Parts:
    """How the lines of a module stand for the parts of a graph: nodes by the child that is called, tensors by name.

    Children that are ``passing`` give a tensor as it is; ``expected`` is the one that checks the inputs. ``shapes`` are
    those of all values, by name.
    """

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.shapes = shapes
        self.nodes: dict[str, ir.Node] = {}
        self.tensors: dict[str, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.passing: set[str] = set()
        self.expected = ""


class Building:
    """Builds the module of one model, and says which part of it is which of the model; ``bare``, it has no numbers."""

    def __init__(self, model: ir.Model, shapes: dict[str, Shape], *, bare: bool) -> None:
        self.model = model
        self.shapes = shapes
        self.bare = bare
        self.version = version_of(model)
        self.root, self.graph, self.names = nn.Module(), fx.Graph(), Names()
        self.parts = Parts(shapes)
        self.lines: dict[ir.Value, fx.Node] = {}
        self.constants = Constants(model, shapes)
        self.functions = tuple(ir.to_proto(each).SerializeToString() for each in model.functions.values())

    def build(self) -> fx.GraphModule:
        """Return the module."""
        given = inputs_of(self.model)
        for value in given:
            name = self.names(value.name)
            line = self.lines[value] = self.graph.placeholder(re.sub(r"\W|^(?=\d)", "_", name))
            self.parts.inputs[str(line.target)] = value
        wanted = [(str(value.name), self.shapes.get(str(value.name))) for value in given]
        self.parts.expected = self.names("inputs")
        self.root.add_module(self.parts.expected, Expected(wanted))
        self.graph.call_module(self.parts.expected, tuple(self.lines[value] for value in given))
        for node in self.model.graph:
            self._add(node)
        outputs = {str(value.name): self._line(value) for value in self.model.graph.outputs}
        self.graph.output(outputs if len(outputs) > 1 else next(iter(outputs.values())))
        return fx.GraphModule(self.root, self.graph, class_name="Graph")

    def _add(self, node: ir.Node) -> None:
        taken = [*node.inputs, *captured(node)]
        path = self.names(node.name or f"{node.op_type}_{node.outputs[0].name}")
        module = self._module(node, taken)
        computed = isinstance(module, opaque.Node) or node.op_type == "Cast"  # whose dtype the merged weights get
        constant = self.constants.made(node) if computed else None
        module = module if constant is None else Operation(_last)
        args = [None if value is None else self._line(value) for value in taken]
        args += [] if constant is None else [self._held(self.names(f"{path}_value"), ir.tensor(constant))]
        self.parts.nodes[path] = node
        self.root.add_module(path, module)
        line = self.graph.call_module(path, tuple(args))
        read = [place for place, value in enumerate(node.outputs) if value.name]
        if len(read) == 1 and not read[0]:
            self.lines[node.outputs[0]] = line
            return
        for place, at in enumerate(read):
            self.lines[node.outputs[at]] = self.graph.call_function(operator.getitem, (line, place))

    def _line(self, value: ir.Value) -> fx.Node:
        """Return the line that computes a value: an initialiser is read where it is first used."""
        if value not in self.lines:
            assert value.const_value is not None
            name = self.names(value.name)
            line = self._held(name, value.const_value)
            self.parts.tensors[name] = value
            if self.constants.may_be_given(value):
                name = self.names(f"{value.name}_given")
                self.parts.passing.add(name)
                self.root.add_module(name, Default())
                line = self.graph.call_module(name, (line,))
            self.lines[value] = line
        return self.lines[value]

    def _held(self, name: str, held: ir.TensorProtocol) -> fx.Node:
        """Return the line that reads a tensor, which the module holds from now on."""
        tensor = torch.empty(0) if self.bare else tensor_of(held.numpy())
        if tensor.is_floating_point():
            self.root.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    def _module(self, node: ir.Node, taken: list[ir.Value | None]) -> nn.Module:
        plain = node.domain in DOMAINS and node.op_identifier() not in self.model.functions
        outputs = [str(value.name) for value in node.outputs if value.name]
        if plain and (function := function_of(node.op_type, self._known(node, len(outputs)))) is not None:
            return Operation(function)
        if plain and node.op_type == "Shape":
            return opaque.Sizes(_attribute(node, "start", 0), _attribute(node, "end", None))
        if plain and node.op_type == "Reshape" and not _attribute(node, "allowzero", 0):
            return opaque.Reshaped()
        proto = ir.to_proto(node).SerializeToString()
        inputs = ["" if value is None else str(value.name) for value in taken]
        opsets, wide = dict(self.model.opset_imports), any(x.dtype is ir.DataType.DOUBLE for x in inputs_of(self.model))
        return opaque.Node(proto, opsets, self.functions, inputs, outputs, wide=wide)

    def _known(self, node: ir.Node, outputs: int) -> Known:
        values = ((place, node.inputs[place]) for place in VALUES.get(node.op_type, ()) if place < len(node.inputs))
        found = {place: self.constants.value(value) for place, value in values if value is not None}
        return Known(
            {name: attribute.value for name, attribute in _plain(node)},
            self.version,
            outputs,
            tuple(None if value is None else self.shapes.get(str(value.name)) for value in node.inputs),
            {place: array.tolist() for place, array in found.items() if array is not None},
            tuple(value is not None for value in node.inputs),
            self._sizes(node),
        )

    def _sizes(self, node: ir.Node) -> Shape | None:
        place = SIZES.get(node.op_type)
        return None if place is None or place >= len(node.inputs) else self.constants.sizes(node.inputs[place])


def _last(*given: Tensor) -> Tensor:
    return given[-1]


def _plain(node: ir.Node) -> Iterator[tuple[str, ir.Attr]]:
    """Yield the attributes that are numbers and texts."""
    held = (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)
    for name, attribute in node.attributes.items():
        if attribute.type in (*held, ir.AttributeType.STRING, ir.AttributeType.STRINGS):
            yield name, ir.Attr(name, attribute.type, _listed(attribute.value))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def captured(node: ir.Node) -> list[ir.Value]:
    """Return what the subgraphs of a node read from outside."""
    graphs: list[Any] = []
    for attribute in node.attributes.values():
        graphs += [attribute.value] if attribute.type is ir.AttributeType.GRAPH else []
        graphs += attribute.value if attribute.type is ir.AttributeType.GRAPHS else []
    inside = [each for graph in graphs for each in RecursiveGraphIterator(graph)]
    nested = [graph for each in inside for attribute in each.attributes.values() for graph in _graphs(attribute)]
    own = {value for graph in (*graphs, *nested) for value in (*graph.inputs, *graph.initializers.values())}
    own |= {value for each in inside for value in each.outputs}
    read = [value for each in inside for value in each.inputs if value is not None]
    read += [value for graph in (*graphs, *nested) for value in graph.outputs]
    return [value for value in dict.fromkeys(read) if value not in own and value not in node.inputs]


def _graphs(attribute: ir.Attr) -> list[Any]:
    if attribute.type is ir.AttributeType.GRAPH:
        return [attribute.value]
    return list(attribute.value) if attribute.type is ir.AttributeType.GRAPHS else []


class Constants:
    """The values of a graph that no input reaches, as far as they are small: numbers that operators have to be told."""

    def __init__(self, model: ir.Model, shapes: dict[str, Shape]) -> None:
        self.model = model
        self.shapes = shapes
        self._known: dict[ir.Value, Any] = {}
        self._constant = {x for x in model.graph.initializers.values() if not self.may_be_given(x)}
        for node in model.graph:
            if self._computes_a_constant(node):
                self._constant.update(node.outputs)

    def _computes_a_constant(self, node: ir.Node) -> bool:
        if node.domain not in DOMAINS or node.op_type.startswith(RANDOM) or captured(node):
            return False
        if node.op_type == "Shape":
            return all(isinstance(n, int) for n in self._sizes_read(node) or (None,))
        return all(x is None or x in self._constant for x in node.inputs)

    def _sizes_read(self, node: ir.Node) -> Shape | None:
        """Return what a Shape gives, as far as it is known."""
        sizes = None if node.inputs[0] is None else self.shapes.get(str(node.inputs[0].name))
        return None if sizes is None else sizes[_attribute(node, "start", 0) : _attribute(node, "end", None)]

    def may_be_given(self, value: ir.Value) -> bool:
        """Whether an initialiser is the default of an input; before version 4 of the format, all were listed there."""
        return value.is_graph_input() and (self.model.ir_version or 0) >= LISTS_NO_WEIGHTS

    def made(self, node: ir.Node) -> Any:
        """Return the tensor that a node computes from constants alone, of whatever size, or None."""
        return self._found(node.outputs[0], LARGE) if len(node.outputs) == 1 else None

    def value(self, value: ir.Value, most: int = FOLDED) -> Any:
        """Return the array that a value always is, or None: where there is none, or of more numbers than ``most``."""
        if value not in self._known:
            found = self._found(value, most)
            if found is None and most < LARGE:
                return None  # a larger one may be
            self._known[value] = found
        return self._known[value]

    def _found(self, value: ir.Value, most: int) -> Any:
        if value not in self._constant:
            return None
        node = value.producer()
        if node is None or node.op_type == "Constant":
            tensor = value.const_value if node is None else ir.convenience.get_const_tensor(value)
            return None if tensor is None or tensor.size > most else tensor.numpy()
        return np.array(self._sizes_read(node)) if node.op_type == "Shape" else self._computed(node, value, most)

    def sizes(self, value: ir.Value | None) -> Shape | None:
        """Return what a list of sizes is, as far as it is known: those that are free by their names."""
        array = None if value is None else self.value(value)
        if array is not None:
            return tuple(int(n) for n in np.reshape(array, -1))
        node = None if value is None else value.producer()
        if node is None or node.domain not in DOMAINS or not node.inputs:
            return None
        if node.op_type == "Shape":
            return self._sizes_read(node)
        if node.op_type == "Concat":
            parts = [self.sizes(x) for x in node.inputs]
            return None if None in parts else tuple(n for part in parts for n in part or ())
        known = self.sizes(node.inputs[0])
        return known if known is None or node.op_type in PASSING else self._taken(node, known)

    def _taken(self, node: ir.Node, sizes: Shape) -> Shape:
        """Return what a node makes of a list of sizes: a part of it, or others of which nothing is known."""
        told = [None if x is None else self.value(x) for x in node.inputs[1:]]
        numbers = [[int(n) for n in np.reshape(array, -1)] for array in told if array is not None]
        if node.op_type == "Gather" and numbers:
            return tuple(sizes[place] for place in numbers[0])
        if node.op_type == "Slice" and len(numbers) == len(told) and numbers[3:] in ([], [[1]]):
            return sizes[numbers[0][0] : numbers[1][0]]
        return (None,) * len(sizes)

    def _computed(self, node: ir.Node, value: ir.Value, most: int) -> Any:
        shape = self.shapes.get(str(value.name))
        sizes = [n for n in shape or () if isinstance(n, int)]
        if shape is None or len(sizes) < len(shape) or prod(sizes) > most:
            return None
        arrays = [None if x is None else self.value(x, most) for x in node.inputs]
        if not arrays or any(x is not None and array is None for x, array in zip(node.inputs, arrays, strict=True)):
            return None
        inputs = ["" if x is None else str(x.name) for x in node.inputs]
        outputs = [str(x.name) for x in node.outputs if x.name]
        proto, opsets = ir.to_proto(node).SerializeToString(), dict(self.model.opset_imports)
        run = opaque.Node(proto, opsets, (), inputs, outputs, wide=True)
        try:
            result = run(*(None if array is None else tensor_of(array) for array in arrays))
        except Exception:  # it takes what no such run has: nothing is known then
            return None
        found = result[outputs.index(str(value.name))] if isinstance(result, tuple) else result
        return found.numpy()


def network_of(model: ir.Model, path: Path) -> fx.GraphModule:
    """Return the module of the model in the file at ``path``."""
    module = Building(model, shapes_of(path), bare=False).build()
    module.eval()
    return module


def parts_of(model: ir.Model, path: Path) -> Parts:
    """Return which part of the module of this model is which of the model; its numbers are not read for that."""
    building = Building(model, shapes_of(path), bare=True)
    building.build()
    return building.parts
