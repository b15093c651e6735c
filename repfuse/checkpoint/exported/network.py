"""An exported program as a network that is called with plain tensors."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from repfuse.checkpoint.exported.contract import input_values
from repfuse.checkpoint.recognise import damaged
from repfuse.errors import RepfuseError
from repfuse.wording import described

LARGEST = 1 << 26  # numbers that inputs may have without being asked for


def opened(program: ExportedProgram, path: Path) -> fx.GraphModule:
    """Return the network of the program in the file at ``path``, which gets an example where it has none.

    Raises RepfuseError where its parts do not fit each other, or where it takes more than tensors.
    """
    try:
        return network_of(complete(program, path))
    except RepfuseError:
        raise
    except Exception as error:  # torch makes code of what the file says, and runs it: anything may be wrong with it
        raise damaged(path, described(error)) from error


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
        if sum(math.prod(_sizes(value)) for value in values) > LARGEST:
            what = f"{path} has no sample inputs, and the inputs that it describes would be very large."
            raise RepfuseError(what, "", "Export it again from a smaller example.")
        made = [_example(value, seed) for seed, value in enumerate(values)]
        program.example_inputs = pytree.tree_unflatten(made, program.call_spec.in_spec)
    return program


def flat_inputs(program: ExportedProgram) -> tuple[Tensor, ...]:
    """Return the program's example as the arguments of its network."""
    return tuple(pytree.tree_leaves(program.example_inputs))


def _example(value: Tensor, seed: int) -> Tensor:
    """Return random values in the shape of a fake tensor; a dynamic axis gets the size it was exported with, or 2."""
    sizes = _sizes(value)
    generator = torch.Generator().manual_seed(seed)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(sizes, generator=generator).to(value.dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(value.dtype)


def _sizes(value: Tensor) -> list[int]:
    return [_size(size) for size in value.shape]


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 2
