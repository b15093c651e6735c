"""Exported programs: what one promises of its inputs, its network, and back from a network; and TorchScript as one.

The promise is which axes are dynamic, in which range, and which are alike. The network is called with plain tensors. A
program is exported like the one that its network came from, or with every axis dynamic that can be.

``torch.jit.load`` runs no Python of a file: it has its own unpickler, and the code in the archive is TorchScript, which
is interpreted. But that interpreter runs the file's ``__setstate__`` methods while it loads, and TorchScript may call
any registered operator, such as ``aten::save`` and ``aten::from_file``, which write and map files. So loading one runs
code of the file, and needs ``--trust``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from repfuse.checking.drift import check_written
from repfuse.checking.runs import call
from repfuse.checkpoint.build import make_inputs, random_tensor
from repfuse.checkpoint.formats import reading
from repfuse.checkpoint.spec import Shape
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError, failing_as, quietly
from repfuse.networks import quantised
from repfuse.recording.copies import changed_copy
from repfuse.wording import described

Axis = int | str  # a fixed size, or an expression of dynamic sizes


@dataclass(frozen=True)
class Contract:
    """``axes`` of each tensor input; dynamic sizes are named d0, d1, ... in their order, ``ranges`` are theirs."""

    axes: tuple[tuple[Axis, ...], ...]
    ranges: tuple[tuple[str, int | None, int | None], ...]

    def admits(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether the axes that are fixed have the sizes of these ``shapes``."""
        pairs = (zip(axes, shape, strict=True) for axes, shape in zip(self.axes, shapes, strict=True))
        return all(axis == size for pair in pairs for axis, size in pair if isinstance(axis, int))

    def describe(self) -> str:
        """Return the shapes as text: ``d0x3xd1xd2``, with the ranges."""
        shapes = ", ".join("x".join(map(str, axes)) for axes in self.axes)
        ranges = ", ".join(f"{name} from {low} to {high or 'any'}" for name, low, high in self.ranges)
        return f"{shapes} ({ranges})" if ranges else shapes


def contract_of(program: ExportedProgram) -> Contract:
    """Return what ``program`` promises of its inputs."""
    shapes = _shapes(program)
    dynamic = (size.node.expr for shape in shapes for size in shape if isinstance(size, torch.SymInt))
    symbols = list(dict.fromkeys(symbol for size in dynamic for symbol in sorted(size.free_symbols, key=str)))
    names = {symbol: f"d{index}" for index, symbol in enumerate(symbols)}

    def axis(size: Any) -> Axis:
        if not isinstance(size, torch.SymInt):
            return int(size)
        return str(size.node.expr.subs({symbol: type(symbol)(name) for symbol, name in names.items()}))

    axes = tuple(tuple(map(axis, shape)) for shape in shapes)
    return Contract(axes, tuple((names[symbol], *range_of(program, symbol)) for symbol in symbols))


def input_values(program: ExportedProgram) -> list[torch.Tensor]:
    """Return the placeholders' fake tensors, in the order of the flattened inputs."""
    wanted = set(program.graph_signature.user_inputs)
    return [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in wanted]


def _dynamic(program: ExportedProgram, dim: Callable[[torch.SymInt], Any]) -> tuple[dict[int, Any], ...]:
    """Return the dynamic shapes of the flattened inputs as torch.export.export takes them."""
    return tuple(
        {axis: dim(size) for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)}
        for shape in _shapes(program)
    )


def _limits(program: ExportedProgram, symbol: Any) -> dict[str, int | None]:
    low, high = range_of(program, symbol)
    return {"min": low or None, "max": high}


def range_of(program: ExportedProgram, symbol: Any) -> tuple[int | None, int | None]:
    """Return the smallest and largest value of a symbol, None where there is no largest."""
    found: Any = program.range_constraints.get(symbol)
    low, high = (found.lower, found.upper) if found is not None else (None, None)
    return _bound(low), _bound(high)


def _shapes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """Return the shape of each input; a dynamic size is a SymInt, unless it stands for one number."""

    def settled(size: Any) -> Any:
        return int(size) if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols else size

    return [tuple(map(settled, value.shape)) for value in input_values(program)]


def _dim(program: ExportedProgram, size: torch.SymInt, dims: dict[Any, Any]) -> Any:
    """Return a Dim, or k * Dim + c where the program says so; an automatic one where it says something else."""
    expression = size.node.expr
    symbol, *others = expression.free_symbols
    offset = expression.subs(symbol, 0)
    factor = expression.subs(symbol, 1) - offset
    if others or expression != factor * symbol + offset:
        return Dim.AUTO(**_limits(program, expression))
    if symbol not in dims:
        dims[symbol] = Dim(f"d{len(dims)}", **_limits(program, symbol))
    scaled = int(factor) * dims[symbol] if factor != 1 else dims[symbol]
    return scaled + int(offset) if offset else scaled


def _bound(value: Any) -> int | None:
    return int(value) if getattr(value, "is_Integer", False) else None  # which an infinity is not


LARGEST = 1 << 26  # numbers that inputs may have without being asked for


def opened(program: ExportedProgram, path: Path) -> fx.GraphModule:
    """Return the network of the program in the file at ``path``, which gets an example where it has none.

    Raises RepfuseError where its parts do not fit each other, or where it takes more than tensors.
    """
    with reading(path, described):  # torch makes code of what the file says, and runs it
        return network_of(complete(program, path))


def network_of(program: ExportedProgram) -> fx.GraphModule:
    """Return the program's network: its flattened inputs are its arguments, its outputs are nested as the program's.

    It refuses what the program refuses: the guards are part of its graph.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    if program.call_spec.out_spec is not None:
        output.args = (pytree.tree_unflatten(list(output.args[0]), program.call_spec.out_spec),)
    graph.set_codegen(CodeGen())
    network = fx.GraphModule(module, graph)  # without the methods and hooks that torch.export put on the other
    return network.eval()


def complete(program: ExportedProgram, path: Path) -> ExportedProgram:
    """Give the program an example where its file has none, and return it.

    Raises RepfuseError where an input is no tensor.
    """
    values = input_values(program)
    if len(values) != len(program.graph_signature.user_inputs) or not all(isinstance(v, Tensor) for v in values):
        raise RepfuseError(
            f"{path} takes inputs that are no tensors.",
            "repfuse calls a network with tensors alone.",
            "Export it with those inputs fixed: functools.partial, or default values.",
        )
    if program.example_inputs is None or not pytree.tree_leaves(program.example_inputs):
        assert program.call_spec.in_spec is not None
        hinted = lambda size: int(size.node.hint) if size.node.has_hint() else 2  # noqa: E731 - as it was when exported
        shapes = [[size if isinstance(size, int) else hinted(size) for size in value.shape] for value in values]
        if sum(map(math.prod, shapes)) > LARGEST:
            what = f"{path} has no sample inputs, and the inputs that it describes would be very large."
            raise RepfuseError(what, "", "Export it again from a smaller example.")
        seeds = (torch.Generator().manual_seed(number) for number in range(len(values)))
        given = zip(shapes, values, seeds, strict=True)
        made = [random_tensor(shape, value.dtype, seed) for shape, value, seed in given]
        program.example_inputs = pytree.tree_unflatten(made, program.call_spec.in_spec)
    return program


def flat_inputs(program: ExportedProgram) -> tuple[Tensor, ...]:
    """Return the program's example as the arguments of its network."""
    return tuple(pytree.tree_leaves(program.example_inputs))


def program_like(original: ExportedProgram, network: nn.Module) -> ExportedProgram:
    """Export ``network``, which was made of ``original``'s, with its dynamic shapes, guards and input structure.

    Raises RepfuseError where it cannot be exported, or where any of that would change.
    """
    what, hint = "The dynamic shapes of the program cannot be kept.", "Choose --format pt."
    dims: dict[Any, Any] = {}
    shapes = _dynamic(original, lambda size: _dim(original, size, dims))
    example = list(flat_inputs(original))
    for at, axes in enumerate(shapes):
        for axis in axes:  # torch.export takes one for a constant
            example[at] = torch.cat([example[at]] * 2, axis) if example[at].shape[axis] == 1 else example[at]
    try:
        program = _export(network, tuple(example), shapes)
    except RepfuseError:  # torch wants guards between sizes, which only its automatic dimensions may have
        automatic = _dynamic(original, lambda size: Dim.AUTO(**_limits(original, size.node.expr)))
        program = _export(network, tuple(example), automatic)
    signature, wanted = program.module_call_graph[0].signature, original.module_call_graph[0].signature
    assert signature is not None and wanted is not None
    signature.in_spec, signature.out_spec = wanted.in_spec, wanted.out_spec
    signature.forward_arg_names = wanted.forward_arg_names
    program.example_inputs = original.example_inputs
    program._guards_code = list(original._guards_code)
    before, after = contract_of(original), contract_of(program)
    if before != after:
        why = f"they were {before.describe()}, and became {after.describe()}"
        raise RepfuseError(what, why, hint, EXIT_FAILED_CHECK)
    return program


def program_of(network: nn.Module, example: Sequence[Tensor], *, sizes: bool = True) -> ExportedProgram:
    """Export ``network`` with its batch and its spatial axes dynamic, as far as its operators take other sizes.

    Without ``sizes`` the batch alone is. Raises RepfuseError where it cannot be exported.
    """
    batch = example[0].shape[:1]

    def axes(x: Tensor, *, batched: bool) -> dict[int, Any]:
        space = range(2, x.dim()) if sizes and x.is_floating_point() and 3 <= x.dim() <= 5 else ()
        return dict.fromkeys([*([0] if batched and x.shape[:1] == batch else []), *space], Dim.AUTO)

    for inputs, batched in ((doubled(example), True), (tuple(example), False)):  # its batch may be a number
        with suppress(RepfuseError):
            program = _export(network, inputs, tuple(axes(x, batched=batched) for x in example))
            if contract_of(program).admits([x.shape for x in example]):
                return program
    return _export(network, tuple(example), None)


def _export(network: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    copied = changed_copy(network, lambda _name, tensor: tensor.clone())  # forward may keep what it is traced with
    what = f"{type(network).__name__} cannot be exported with torch.export."
    with failing_as(what, "Choose --format pt, state-dict or safetensors."), quietly(), torch.no_grad():
        return torch.export.export(copied, inputs, dynamic_shapes=shapes, strict=False)


def doubled(example: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the example with a batch of two where it has a batch of one: torch.export takes one for a constant."""
    batch = example[0].shape[:1]
    return tuple(torch.cat([x, x]) if batch == (1,) and x.shape[:1] == batch else x for x in example)


ADVICE = (
    "Export the network from Python instead: torch.export.save(torch.export.export(model, inputs), 'model.pt2'), or "
    "torch.save(model, 'model.pt')."
)

QUANTISED = re.compile(r"(?P<aware>aten::\w*fake_quant)|quantized::(?!\w*dynamic)")
"""Operators of int8, and of the way there. A layer that is dynamically quantised leaves the others as they are."""


def read_torchscript(path: Path, shapes: Sequence[Shape] | None, *, trust: bool) -> ExportedProgram:
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
    with reading(path), quietly():
        script: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        script.eval()
    if found := QUANTISED.search(str(script.inlined_graph)):
        raise quantised(str(path), aware=found["aware"] is not None)
    inputs = make_inputs(shapes, script)
    program = _convert(path, script, inputs)
    network = network_of(program)
    try:
        run = lambda trials: ("", [call(script, trial.inputs) for trial in trials])  # noqa: E731
        check_written(network, network, inputs, run, gate=network)
    except RepfuseError as error:
        what = f"PyTorch's converter does not give the network of {path}."
        raise RepfuseError(what, error.why, ADVICE) from error
    return program


def _convert(path: Path, script: torch.jit.ScriptModule, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    what, why = f"The TorchScript of {path} cannot be converted.", "PyTorch's converter fails: "
    with failing_as(what, ADVICE, why=lambda error: why + described(error)), quietly():
        from torch._export.converter import TS2EPConverter  # which goes away in some later version

        program: ExportedProgram = TS2EPConverter(script, doubled(inputs), {}).convert()
    program.example_inputs = (inputs, {})
    return program
