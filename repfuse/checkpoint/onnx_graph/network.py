"""The graph of an ONNX file as a module: one call of a child for each node, which functions of torch compute.

The module is an ``fx.GraphModule``, as exported programs are: what is planned and rewritten are its lines, and each
line goes back to its node by the name of the child that it calls.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.traversal import RecursiveGraphIterator
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from repfuse.checkpoint import onnx_file
from repfuse.checkpoint.onnx_graph.operators import DTYPES, VALUES, Function, Known, Shape, function_of
from repfuse.checkpoint.onnx_graph.reading import (
    DOMAINS,
    LISTS_NO_WEIGHTS,
    array_of,
    inputs_of,
    shapes_of,
    tensor_of,
    tensors_of,
    version_of,
)
from repfuse.memory import HUGE, stream

NUMBER_OF = {dtype: number for number, dtype in DTYPES.items()}
RANDOM = ("Random", "Bernoulli", "Multinomial")  # whose results are none that stay
FOLDED = 1 << 10  # numbers that a constant may have to be looked for as an argument of an operator
LARGE = 1 << 26
"""As many numbers as a constant may have to be computed at all when a file is read."""
_TYPES = ir.AttributeType
PLAIN = {_TYPES.INT, _TYPES.INTS, _TYPES.FLOAT, _TYPES.FLOATS, _TYPES.STRING, _TYPES.STRINGS}


class OnnxNode(nn.Module):
    """A node, as a function of torch."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor | None) -> Any:
        """Compute the node."""
        return self.function(*inputs)


class Unseen(nn.Module):
    """A function that a recording does not look into: what it gives comes from nowhere, which is a source."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor | None) -> Any:
        """Call it."""
        with torch._C.DisableTorchFunction():
            return self.function(*inputs)


def _check_sizes(wanted: Sequence[tuple[str, Shape | None]], *inputs: Tensor) -> None:
    """Raise AssertionError where an input has another size than the file says of it, as an exported program does."""
    for (name, sizes), x in zip(wanted, inputs, strict=True):
        if sizes is None:
            continue
        pairs = zip(sizes, x.shape, strict=False)
        if len(sizes) != x.dim() or any(isinstance(n, int) and n != m for n, m in pairs):
            said, given = "x".join("?" if n is None else str(n) for n in sizes), "x".join(map(str, x.shape))
            raise AssertionError(f"Guard failed: {name} is {given}, and the file takes {said}")


def _sizes(start: int, end: int | None, x: Tensor) -> Tensor:
    """``Shape``: the sizes of a tensor, as a tensor. It reads no number of it, which a recording sees."""
    with torch._C.DisableTorchFunction():
        sizes = list(x.shape[start:end])
    return torch.tensor(sizes, dtype=torch.int64)


def _reshaped(x: Tensor, shape: Tensor) -> Tensor:
    """``Reshape`` to a shape that is computed; a size of 0 stands for the one that the tensor has."""
    return x.reshape([x.shape[axis] if n == 0 else n for axis, n in enumerate(shape.tolist())]).clone()


class Foreign(nn.Module):
    """A node that torch has no function for: run by itself, in ONNX Runtime or as ONNX itself defines it.

    ``inputs`` and ``outputs`` are the names of what it takes and gives; what its subgraphs take from outside is among
    the inputs. ONNX Runtime has few operators in float64: of a model in it (``wide``), what that lacks is run as ONNX
    defines it, by the reference; of any other, in float32, and the node is ``narrow`` from then on.
    """

    def __init__(self, node: ir.Node, model: ir.Model, functions: list[onnx.FunctionProto], *, wide: bool) -> None:
        super().__init__()
        self.wide, self.narrow = wide, False
        self.inputs = tuple("" if value is None else str(value.name) for value in (*node.inputs, *captured(node)))
        self.outputs = tuple(str(value.name) for value in node.outputs if value.name)
        graph = helper.make_graph([ir.to_proto(node)], "node", [], [onnx.ValueInfoProto(name=x) for x in self.outputs])
        imports = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        proto = helper.make_model(graph, opset_imports=imports, functions=functions)
        proto.ir_version = min(proto.ir_version, 10)
        self.model = bytes(proto.SerializeToString())

    def forward(self, *inputs: Tensor | None) -> Any:
        """Run the node, unseen."""
        with torch._C.DisableTorchFunction():
            if (found := self._run(inputs)) is not None:
                return found
            self.narrow = True
            found = self._run([x.float() if x is not None and x.dtype is torch.float64 else x for x in inputs])
            return tree_map(lambda x: x.double() if x.dtype is torch.float32 else x, found)

    def _run(self, inputs: Sequence[Tensor | None]) -> Any:
        """Return what the node gives; None where ONNX Runtime is to run it, and does not in float64."""
        given = {name: x for name, x in zip(self.inputs, inputs, strict=True) if x is not None}
        numbers = tuple((name, NUMBER_OF[x.dtype]) for name, x in given.items())
        fed = {name: array_of(x) for name, x in given.items()}
        model = _taking(self.model, numbers)
        try:
            found = _session(model).run(None, fed)
        except Exception:  # it has no class for its errors
            if not self.wide and torch.float64 in {x.dtype for x in given.values()}:
                return None
            found = _reference(model).run(None, fed)
        tensors = [tensor_of(np.asarray(array)) for array in found]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


@lru_cache(maxsize=1024)
def _taking(model: bytes, inputs: tuple[tuple[str, int], ...]) -> bytes:
    """Return a model of one node with inputs of these names and dtypes."""
    proto = onnx.ModelProto.FromString(model)
    proto.graph.input.extend(helper.make_tensor_value_info(name, number, None) for name, number in inputs)
    return bytes(proto.SerializeToString())


_session = lru_cache(maxsize=1024)(partial(onnx_file.session, threads=1))
_reference = lru_cache(maxsize=1024)(lambda model: ReferenceEvaluator(onnx.ModelProto.FromString(model)))


def unique(name: str, taken: set[str]) -> str:
    """Return a name like this one that is not taken yet; from now on it is."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


class Building:
    """Builds the module of the model in the file at ``path``; ``bare``, it has no numbers, and none are read.

    Afterwards it says how the lines of the module stand for the parts of the graph: ``nodes`` by the child that is
    called, ``tensors`` and ``inputs`` by name. Children that are ``passing`` give a tensor as it is; ``expected`` is
    the one that checks the inputs. ``shapes`` are those of all values, by name.
    """

    def __init__(self, model: ir.Model, path: Path, *, bare: bool) -> None:
        self.model, self.shapes, self.bare = model, shapes_of(path), bare
        self.nodes: dict[str, ir.Node] = {}
        self.tensors: dict[str, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.passing: set[str] = set()
        self.expected = ""
        self._root, self._graph, self._taken = nn.Module(), fx.Graph(), {*dir(fx.GraphModule), *keyword.kwlist}
        self._lines: dict[ir.Value, fx.Node] = {}
        self._constants = ComputedConstants(model, self.shapes)
        self._ends = set(ends_of_groups(model.graph))
        self._functions = [ir.to_proto(each) for each in model.functions.values()]

    def _name(self, name: str | None) -> str:
        """Return a name of a child or a tensor of the module, for one of ONNX: those may be any text."""
        return unique(re.sub(r"[^\w/:-]", "_", name or "node"), self._taken)

    def build(self) -> fx.GraphModule:
        """Return the module."""
        given = inputs_of(self.model)
        for value in given:
            name = self._name(value.name)
            line = self._lines[value] = self._graph.placeholder(re.sub(r"\W|^(?=\d)", "_", name))
            self.inputs[str(line.target)] = value
        wanted = [(str(value.name), self.shapes.get(str(value.name))) for value in given]
        self.expected = self._name("inputs")
        self._root.add_module(self.expected, Unseen(partial(_check_sizes, wanted)))
        self._graph.call_module(self.expected, tuple(self._lines[value] for value in given))
        for node in self.model.graph:
            self._add(node)
        outputs = {str(value.name): self._line(value) for value in self.model.graph.outputs}
        self._graph.output(outputs if len(outputs) > 1 else next(iter(outputs.values())))
        return fx.GraphModule(self._root, self._graph, class_name="Graph")

    def _add(self, node: ir.Node) -> None:
        path = self._name(node.name or f"{node.op_type}_{node.outputs[0].name}")
        module = self._module(node)
        computed = isinstance(module, Foreign) or node.op_type == "Cast"  # whose dtype the merged weights get
        constant = self._constants.made(node) if computed else None
        module = module if constant is None else OnnxNode(lambda *given: given[-1])
        args = [None if x is None else self._line(x) for x in (*node.inputs, *captured(node))]
        args += [] if constant is None else [self._held(self._name(f"{path}_value"), ir.tensor(constant))]
        self.nodes[path] = node
        self._root.add_module(path, module)
        line = self._graph.call_module(path, tuple(args))
        read = [place for place, value in enumerate(node.outputs) if value.name]
        if len(read) == 1 and not read[0]:
            self._lines[node.outputs[0]] = line
            return
        for place, at in enumerate(read):
            self._lines[node.outputs[at]] = self._graph.call_function(operator.getitem, (line, place))

    def _line(self, value: ir.Value) -> fx.Node:
        """Return the line that computes a value: an initialiser is read where it is first used."""
        if value not in self._lines:
            assert value.const_value is not None
            name = self._name(value.name)
            line = self._held(name, value.const_value)
            self.tensors[name] = value
            if self._constants.may_be_given(value):
                name = self._name(f"{value.name}_given")
                self.passing.add(name)
                self._root.add_module(name, Unseen(torch.clone))
                line = self._graph.call_module(name, (line,))
            self._lines[value] = line
        return self._lines[value]

    def _held(self, name: str, held: ir.TensorProtocol) -> fx.Node:
        """Return the line that reads a tensor, which the module holds from now on."""
        tensor = torch.empty(0) if self.bare else tensor_of(held.numpy())
        if tensor.is_floating_point():
            self._root.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self._root.register_buffer(name, tensor)
        return self._graph.get_attr(name)

    def _module(self, node: ir.Node) -> nn.Module:
        plain = node.domain in DOMAINS and node.op_identifier() not in self.model.functions
        if plain and (function := function_of(node.op_type, self._known(node))) is not None:
            return Unseen(function) if node in self._ends else OnnxNode(function)
        if plain and node.op_type == "Shape":
            return OnnxNode(partial(_sizes, *_bounds(node)))
        if plain and node.op_type == "Reshape" and not node.attributes.get_int("allowzero", 0):
            return Unseen(_reshaped)
        wide = any(x.dtype is ir.DataType.DOUBLE for x in inputs_of(self.model))
        return Foreign(node, self.model, self._functions, wide=wide)

    def _known(self, node: ir.Node) -> Known:
        values = ((place, node.inputs[place]) for place in VALUES.get(node.op_type, ()) if place < len(node.inputs))
        found = {place: self._constants.value(value) for place, value in values if value is not None}
        return Known(
            {
                name: list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value
                for name, attribute in node.attributes.items()
                if attribute.type in PLAIN
            },
            version_of(self.model),
            sum(1 for value in node.outputs if value.name),
            tuple(None if value is None else self.shapes.get(str(value.name)) for value in node.inputs),
            {place: array.tolist() for place, array in found.items() if array is not None},
            tuple(value is not None for value in node.inputs),
            self.shapes.get(str(node.outputs[0].name)),
        )


def ends_of_groups(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes that scale or shift what a runtime computes as one operator with the nodes before them.

    Those are GELU, as exporters wrote it before opset 20, ``x (1 + erf(x / sqrt(2))) / 2``, and layer normalisation,
    before 17. A scale that went into the next layer would save less than that operator.
    """
    for node in graph:
        if node.op_type == "Erf":
            yield from _after(node, "Add", "Mul", "Mul")
        elif node.op_type == "Div" and node.inputs[1] is not None:
            divisor = node.inputs[1].producer()
            if divisor is not None and divisor.op_type == "Sqrt":
                yield from _after(node, "Mul")
                yield from _after(node, "Mul", "Add")


def _after(node: ir.Node, *kinds: str) -> list[ir.Node]:
    """Return the ends of all rows of nodes of these kinds behind a node."""
    ends = [node]
    for kind in kinds:
        ends = [user for end in ends for user in end.outputs[0].consumers() if user.op_type == kind]
    return ends


def _bounds(node: ir.Node) -> tuple[int, int | None]:
    """Return between which axes a Shape looks."""
    return node.attributes.get_int("start", 0), node.attributes.get_int("end", None)


def captured(node: ir.Node) -> list[ir.Value]:
    """Return what the subgraphs of a node read from outside."""
    graphs, inside = list[Any](), list[ir.Node]()
    for attribute in node.attributes.values():
        one = attribute.type is ir.AttributeType.GRAPH
        held = [attribute.value] if one else attribute.value if attribute.type is ir.AttributeType.GRAPHS else []
        inside += [each for graph in held for each in RecursiveGraphIterator(graph, enter_graph=graphs.append)]
    read = [value for each in inside for value in each.inputs if value is not None]
    read += [value for graph in graphs for value in graph.outputs]
    return [value for value in dict.fromkeys(read) if value.graph not in graphs and value not in node.inputs]


class ComputedConstants:
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
        return None if sizes is None else sizes[slice(*_bounds(node))]

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

    def _computed(self, node: ir.Node, value: ir.Value, most: int) -> Any:
        shape = self.shapes.get(str(value.name))
        sizes = [n for n in shape or () if isinstance(n, int)]
        if shape is None or len(sizes) < len(shape) or prod(sizes) > most:
            return None
        arrays = [None if x is None else self.value(x, most) for x in node.inputs]
        if not arrays or any(x is not None and array is None for x, array in zip(node.inputs, arrays, strict=True)):
            return None
        run = Foreign(node, self.model, [], wide=True)
        try:
            result = run(*(None if array is None else tensor_of(array) for array in arrays))
        except Exception:  # it takes what no such run has: nothing is known then
            return None
        found = result[run.outputs.index(str(value.name))] if isinstance(result, tuple) else result
        return found.numpy()


def network_of(model: ir.Model, path: Path) -> fx.GraphModule:
    """Return the module of the model in the file at ``path``."""
    module = Building(model, path, bare=False).build().eval()
    if sum(tensor.nbytes for _, tensor in tensors_of(model)) >= HUGE:
        stream(module)
    return module
