"""ONNX files for the tests: of PyTorch's exporters, and built by hand as other converters write them."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import repfuse
from repfuse.plans import Plan

NUMBERS = {np.float64: TensorProto.DOUBLE, np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def exported(net: nn.Module, example: Sequence[Tensor], path: Path, *, dynamo: bool = False, **settings: Any) -> Path:
    """The file that PyTorch makes of a network; the older exporter keeps all its normalisations, and its batch free."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                torch.onnx.export(net, tuple(example), str(path), dynamo=True, verbose=False, **settings)
            else:
                names = [f"x{place}" for place in range(len(example))]
                usual = {
                    "training": torch.onnx.TrainingMode.PRESERVE,
                    "do_constant_folding": False,
                    "opset_version": 17,
                    "dynamic_axes": {name: {0: "n"} for name in names},
                }
                torch.onnx.export(net, tuple(example), str(path), dynamo=False, input_names=names, **usual | settings)
    finally:
        logging.disable(logging.NOTSET)
    return path


def tensor(seed: int, *shape: int, dtype: Any = np.float64) -> np.ndarray:
    """Seeded noise."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node, its inputs and outputs as words; ``_`` is one that is left out."""
    given, gives = ["" if name == "_" else name for name in inputs.split()], outputs.split()
    domain = attributes.pop("domain", None)
    return helper.make_node(kind, given, gives, name=f"{kind}_{gives[0]}", domain=domain, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    tensors: Mapping[str, np.ndarray],
    *,
    shape: Sequence[int | str] = ("n", 4, "h", "w"),
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    dtype: Any = np.float64,
    **more: Any,
) -> onnx.ModelProto:
    """A model of one input ``x``."""
    number = NUMBERS[dtype]
    given = [helper.make_tensor_value_info("x", number, shape)]
    gives = [helper.make_tensor_value_info(name, number, [None] * len(shape)) for name in outputs]
    held = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(list(nodes), "graph", given, gives, held)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in more.pop("domains", ()))]
    made = helper.make_model(graph, opset_imports=imports, ir_version=more.pop("ir_version", 8), **more)
    made.producer_name, made.producer_version = "someone", "1.0"
    helper.set_model_props(made, {"author": "nobody"})
    return made


def kinds(path: Path | onnx.ModelProto) -> Counter[str]:
    """How many nodes of each kind there are."""
    held = onnx.load(path, load_external_data=False) if isinstance(path, Path) else path
    return Counter(each.op_type for each in held.graph.node)


def fused(path: Path, out: Path, example: str | None = None, **settings: Any) -> Plan:
    """Convert a file without running the result, and return the plan."""
    checkpoint = repfuse.load(path, input=example)
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs, **settings)
    repfuse.save(checkpoint, result.module, out, plan=result.plan, verify=False, force=True)
    return result.plan


def run(path: Path, *inputs: np.ndarray) -> list[np.ndarray]:
    """What ONNX's own implementation computes of it."""
    evaluator = ReferenceEvaluator(str(path))
    return evaluator.run(None, dict(zip(evaluator.input_names, inputs, strict=True)))


def error(one: Path, other: Path, *inputs: np.ndarray) -> float:
    """Largest difference of the outputs, relative to the largest number in each; infinite for other shapes."""
    pairs = list(zip(run(one, *inputs), run(other, *inputs), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300)) for a, b in pairs)


def wide(path: Path, channels: int, blocks: int) -> int:
    """Write blocks of ``relu(conv3(x) + conv1(x) + x)`` with weights in a file beside the model, a piece at a time.

    Returns the bytes of the weights of one block.
    """
    noise, held, nodes, x = tensor(0, 1 << 20, dtype=np.float32), [], [], "x"
    with path.with_name(f"{path.name}.data").open("wb") as file:

        def weight(name: str, *shape: int) -> None:
            count, start = int(np.prod(shape)), file.tell()
            scaled = np.roll(noise, len(held)) * np.float32(0.5 / np.sqrt(np.prod(shape[1:])))
            for left in range(count, 0, -len(scaled)):
                file.write(scaled[:left].data)
            made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
            said = {"location": Path(file.name).name, "offset": start, "length": 4 * count}
            made.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in said.items()
            )
            held.append(made)

        for number in range(blocks):
            a, c, d, e, y = (f"{letter}{number}" for letter in "acdey")
            for name, size in ((f"three{number}", 3), (f"one{number}", 1)):
                weight(name, channels, channels, size, size)
            nodes += [
                node("Conv", f"{x} three{number}", a, pads=[1] * 4), node("Conv", f"{x} one{number}", c),
                node("Add", f"{a} {c}", d), node("Add", f"{d} {x}", e), node("Relu", e, y),
            ]  # fmt: skip
            x = y
    made = model(nodes, {}, shape=("n", channels, "h", "w"), outputs=(x,), dtype=np.float32)
    made.graph.initializer.extend(held)
    onnx.save(made, path)
    return sum(int(entry.value) for each in held[:2] for entry in each.external_data if entry.key == "length")
