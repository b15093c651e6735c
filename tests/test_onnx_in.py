"""ONNX files in: what converters write is read, merged and written again, and everything else in the file stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from support.agreement import randomised
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from support.onnx_models import error, exported, fused, kinds, model, node, tensor  # noqa: E402

import repfuse  # noqa: E402
from repfuse.checkpoint.onnx_graph import operators  # noqa: E402
from repfuse.cli import app  # noqa: E402
from repfuse.errors import RepfuseError  # noqa: E402
from repfuse.plan_file import said_beside  # noqa: E402
from repfuse.plans import Policy  # noqa: E402

W3, W1, BIAS = tensor(1, 4, 4, 3, 3), tensor(2, 4, 4, 1, 1), tensor(3, 4)
NORM = {"g": tensor(4, 4), "b": tensor(5, 4), "m": tensor(6, 4), "v": np.abs(tensor(7, 4)) + 0.5}
IMAGE = tensor(8, 2, 4, 9, 10)
BRANCHES = [node("Conv", "x w3", "a", pads=[1, 1, 1, 1]), node("Conv", "x w1", "c")]
WEIGHTS = {"w3": W3, "w1": W1}


def written(made: Any, path: Path) -> Path:
    onnx.checker.check_model(made)
    onnx.save(made, path)
    return path


def attributes(each: Any) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in each.attribute}


# How converters write what merges


@dataclass(frozen=True)
class Spelling:
    """Nodes from ``x`` to ``y`` of which ``left`` are left; ``gone`` are kinds of which none is."""

    name: str
    nodes: Sequence[Any]
    tensors: dict[str, np.ndarray]
    left: dict[str, int] = field(default_factory=lambda: {"Conv": 1, "Add": 0, "BatchNormalization": 0})
    opset: int = 17
    shape: tuple[Any, ...] = ("n", 4, "h", "w")
    given: np.ndarray = field(default_factory=lambda: IMAGE)
    means: int = 0
    """The opset in which it means the same, where ONNX's own implementation is wrong of its own."""

    def __str__(self) -> str:
        return self.name


def beside(nodes: Sequence[Any], **tensors: np.ndarray) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Nodes from ``x`` to ``z``, beside a 3x3."""
    return [BRANCHES[0], *nodes, node("Add", "a z", "y")], {"w3": W3, **tensors}


ROW = {"v2": tensor(20, 4), "v3": tensor(21, 4)}
MATRICES = {"p": tensor(9, 4, 6), "q": tensor(10, 4, 6), "pt": tensor(9, 6, 4), "r": tensor(11, 6)}
FLAT = {"shape": ("n", 4), "given": tensor(12, 3, 4)}
NORMED = node("BatchNormalization", "c g b m v", "z", epsilon=1e-3)

SPELLINGS = [
    Spelling("auto_pad", [
        node("Conv", "x w3", "a", auto_pad="SAME_UPPER"),
        node("Conv", "x w1", "c", auto_pad="VALID"),
        node("Add", "a c", "y"),
    ], WEIGHTS),
    Spelling("even kernels, padded on one side", [
        node("Conv", "x k", "a", pads=[0, 1, 1, 0]), node("Conv", "x w1 i", "c"), node("Add", "a c", "y"),
    ], {"k": tensor(13, 4, 4, 2, 2), "w1": W1, "i": BIAS}),
    Spelling("auto_pad with a stride, of a fixed size", [
        node("Conv", "x w3", "a", auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Conv", "x w1", "c", strides=[2, 2]),
        node("Add", "a c", "y"),
    ], WEIGHTS, shape=("n", 4, 9, 11), given=tensor(14, 2, 4, 9, 11)),
    *(Spelling(f"norm of opset {opset}", *beside([BRANCHES[1], NORMED], w1=W1, **NORM), opset=opset, means=15)
      for opset in (7, 9, 12, 14, 15, 18, 21)),
    Spelling("scaled and shifted by broadcast constants", [
        *BRANCHES, node("Mul", "s a", "a2"), node("Add", "a2 t", "a3"), node("Sub", "a3 u", "a4"),
        node("Div", "c d", "c2"), node("Sum", "a4 c2 x", "y"),
    ], {**WEIGHTS, "s": tensor(15, 4, 1, 1), "t": tensor(16, 1, 4, 1, 1), "u": np.array(0.25), "d": np.array([2.0])},
        {"Conv": 1, "Add": 0, "Mul": 0, "Sub": 0, "Div": 0, "Sum": 0}),
    Spelling("a difference", [*BRANCHES, node("Sub", "a c", "y")], WEIGHTS, {"Conv": 1, "Sub": 0}),
    Spelling("Gemm and MatMul with Add", [
        node("Gemm", "x p r", "a"), node("MatMul", "x q", "c"), node("Add", "c r", "d"), node("Add", "a d", "y"),
    ], {name: MATRICES[name] for name in "pqr"}, {"Gemm": 1, "MatMul": 0, "Add": 0}, **FLAT),
    Spelling("Gemm with factors, and turned", [
        node("Gemm", "x pt r", "a", transB=1, alpha=0.5, beta=2.0), node("MatMul", "x q", "c"), node("Add", "a c", "y"),
    ], {name: MATRICES[name] for name in ("pt", "q", "r")}, {"Gemm": 1, "MatMul": 0, "Add": 0}, **FLAT),
    Spelling("MatMul of tokens", [
        node("MatMul", "x p", "a"), node("MatMul", "x q", "c"), node("Add", "a c", "d"), node("Add", "d r", "y"),
    ], {name: MATRICES[name] for name in "pqr"}, {"MatMul": 1, "Add": 1},
        shape=("n", "t", 4), given=tensor(12, 2, 5, 4)),
    Spelling("a norm of rows", [
        node("MatMul", "x p", "a"), node("Shape", "a", "s"), node("Reshape", "a rows", "c"),
        node("BatchNormalization", "c g b m v", "d"), node("Reshape", "d s", "y"),
    ], {"p": tensor(9, 4, 4), "rows": np.array([-1, 4]), **NORM},
        {"MatMul": 1, "BatchNormalization": 0},
        shape=("n", "t", 4), given=tensor(12, 2, 5, 4), means=17),
    Spelling("what ends inside of a node", [
        *BRANCHES, node("Add", "a c", "d"), node("HardSigmoid", "d", "y", alpha=0.3, beta=0.4),
    ], WEIGHTS, {"Conv": 1, "Add": 0, "HardSigmoid": 1}),
    Spelling("an average that counts its border", *beside([
        node("AveragePool", "x", "z", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    ]), {"Conv": 1, "AveragePool": 0}),
    Spelling("Pad with an attribute", [
        node("Pad", "x", "e", mode="constant", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0),
        node("Conv", "e w3", "a"), BRANCHES[1], node("Add", "a c", "y"),
    ], WEIGHTS, {"Conv": 1, "Pad": 0}, opset=10),
    Spelling("Pad with an input", [
        node("Pad", "x k", "e"), node("Conv", "e w3", "a"), BRANCHES[1], node("Add", "a c", "y"),
    ], {**WEIGHTS, "k": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, {"Conv": 1, "Pad": 0}),
    Spelling("Pad of some axes", [
        node("Pad", "x k _ l", "e"), node("Conv", "e w3", "a"), BRANCHES[1], node("Add", "a c", "y"),
    ], {**WEIGHTS, "k": np.array([1, 1, 1, 1]), "l": np.array([-2, 3])}, {"Conv": 1, "Pad": 0}, opset=18),
    Spelling("Concat and Split of channels", *beside([
        node("Split", "x sizes", "p q", axis=1), node("Conv", "p u", "s"), node("Conv", "q u", "t"),
        node("Concat", "s t", "z", axis=1),
    ], sizes=np.array([2, 2]), u=tensor(17, 2, 2, 1, 1)), {"Conv": 1, "Split": 0, "Concat": 0}),
    Spelling("Split into halves of opset 18", *beside([
        node("Split", "x", "p q", axis=1, num_outputs=2), node("Conv", "p u", "s"), node("Conv", "q u", "t"),
        node("Concat", "s t", "z", axis=1),
    ], u=tensor(17, 2, 2, 1, 1)), {"Conv": 1, "Split": 0, "Concat": 0}, opset=18),
    Spelling("Slice of channels", *beside([
        node("Slice", "x f t k", "p"), node("Conv", "p u", "z"),
    ], f=np.array([2]), t=np.array([2**63 - 1]), k=np.array([1]), u=tensor(18, 4, 2, 1, 1)), {"Conv": 1, "Slice": 0}),
    Spelling("Gather of channels", *beside([
        node("Gather", "x k", "p", axis=1), node("Conv", "p w1", "z"),
    ], k=np.array([3, 0, -3, 2]), w1=W1), {"Conv": 1, "Gather": 0}),
    Spelling("a shuffle of channels", *beside([
        node("Reshape", "x s", "p"), node("Transpose", "p", "q", perm=[0, 2, 1, 3, 4]), node("Reshape", "q t", "r"),
        node("Conv", "r w1", "z"),
    ], s=np.array([0, 2, 2, 5, 6]), t=np.array([-1, 4, 5, 6]), w1=W1), {"Conv": 1, "Transpose": 0},
        shape=("n", 4, 5, 6), given=tensor(19, 2, 4, 5, 6)),
    Spelling("a layer, its channels as an image, a 1x1", [
        node("MatMul", "x p", "a"), node("Transpose", "a", "c", perm=[0, 2, 1]), node("Unsqueeze", "c two", "d"),
        node("Conv", "d k", "e"), node("Squeeze", "e two", "y"),
    ], {"p": tensor(9, 4, 6), "two": np.array([2]), "k": tensor(10, 5, 6, 1, 1)}, {"MatMul": 0, "Conv": 1},
        shape=("n", "t", 4), given=tensor(12, 2, 5, 4)),
    Spelling("pixels as tokens, of sizes that are computed", [
        node("BatchNormalization", "x g b m v", "a"), node("Shape", "a", "s"), node("Slice", "s zero two", "t"),
        node("Concat", "t rest", "u", axis=0), node("Reshape", "a u", "c"), node("Transpose", "c", "d", perm=[0, 2, 1]),
        node("MatMul", "d p", "e"), node("Unsqueeze", "e two", "y"),
    ], {"zero": np.array([0]), "two": np.array([2]), "rest": np.array([-1]), "p": tensor(9, 4, 4), **NORM},
        {"BatchNormalization": 0, "MatMul": 1}, means=17),
    *(Spelling(f"DepthToSpace {mode}", [
        node("Conv", "x w3", "a", pads=[1, 1, 1, 1]), node("DepthToSpace", "a", "d", blocksize=2, mode=mode),
        node("Mul", "d s", "y"),
    ], {"w3": W3, "s": np.array([[[2.0]]])}, {"Conv": 1, "Mul": 0}) for mode in ("DCR", "CRD")),
    Spelling("SpaceToDepth", [
        node("SpaceToDepth", "x", "d", blocksize=2), node("Conv", "d k", "a"),
        node("Conv", "x w1", "c", strides=[2, 2]), node("Add", "a c", "y"),
    ], {"k": tensor(20, 4, 16, 1, 1), "w1": W1}, {"Conv": 1, "SpaceToDepth": 0, "Add": 0},
        shape=("n", 4, 8, 6), given=tensor(21, 2, 4, 8, 6)),
    Spelling("ConvTranspose", [
        node("ConvTranspose", "x k", "a", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("ConvTranspose", "x l i", "c", strides=[2, 2], output_padding=[1, 1], kernel_shape=[1, 1]),
        node("Add", "a c", "y"),
    ], {"k": tensor(22, 4, 4, 4, 4), "l": tensor(23, 4, 4, 1, 1), "i": BIAS}, {"ConvTranspose": 1, "Add": 0}),
    Spelling("no-ops in between", [
        *BRANCHES, node("Identity", "a", "a2"), node("Dropout", "c", "c2"), node("Add", "a2 c2", "d"),
        node("Identity", "d", "y"),
    ], WEIGHTS, {"Conv": 1, "Identity": 0, "Dropout": 0}),
    Spelling("Clip after", [*BRANCHES, node("Add", "a c", "d"), node("Clip", "d lo hi", "y")],
             {**WEIGHTS, "lo": np.array(0.0), "hi": np.array(6.0)}, {"Conv": 1, "Clip": 1}),
    Spelling("weights behind other nodes", [
        node("Identity", "w3", "k"), node("Transpose", "wt", "l", perm=[1, 0, 2, 3]),
        node("Cast", "half", "i", to=TensorProto.DOUBLE),
        node("Constant", "", "s", value=numpy_helper.from_array(BIAS)), node("Unsqueeze", "s axes", "s2"),
        node("Conv", "x k s", "a", pads=[1, 1, 1, 1]), node("Conv", "x l i", "c"), node("Mul", "c s2", "d"),
        node("Add", "a d", "y"),
    ], {"w3": W3, "wt": W1, "half": BIAS.astype(np.float16), "axes": np.array([1, 2])},
        {"Conv": 1, "Identity": 0, "Transpose": 0, "Cast": 0, "Unsqueeze": 0, "Constant": 0}),
    Spelling("zeros of a shape, and weights that nothing but ONNX computes", [
        BRANCHES[0], node("ConstantOfShape", "s", "z", value=numpy_helper.from_array(np.array([0.5]))),
        node("CumSum", "i k", "t"), node("Conv", "x w1 t", "u"), node("Add", "a z", "d"), node("Add", "d u", "y"),
    ], {**WEIGHTS, "s": np.array([4, 1, 1]), "i": BIAS, "k": np.array(0)},
        {"Conv": 1, "ConstantOfShape": 0, "CumSum": 0}),
]  # fmt: skip


@pytest.mark.parametrize("row", SPELLINGS, ids=str)
def test_spelling(row: Spelling, tmp_path: Path) -> None:
    made = onnx.shape_inference.infer_shapes(model(row.nodes, row.tensors, shape=row.shape, opset=row.opset))
    path, out = written(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    size = "x".join(map(str, row.given.shape))
    plan = fused(path, out, size)
    assert plan.sites, plan.refusals
    left = kinds(out)
    assert {kind: left[kind] for kind in row.left} == row.left
    known = model(row.nodes, row.tensors, shape=row.shape, opset=row.means or row.opset)
    assert error(written(known, tmp_path / "known.onnx"), out, row.given) < 1e-12
    onnx.checker.check_model(str(out), full_check=True)


def test_one_and_three_axes_of_space(tmp_path: Path) -> None:
    for axes in (1, 3):
        nodes = [node("Conv", "x w3", "a", pads=[1] * 2 * axes), node("Conv", "x w1", "c"), node("Add", "a c", "y")]
        held = {"w3": tensor(1, 4, 4, *[3] * axes), "w1": tensor(2, 4, 4, *[1] * axes)}
        path = written(model(nodes, held, shape=("n", 4, *["d"] * axes)), tmp_path / f"{axes}.onnx")
        fused(path, tmp_path / "out.onnx", "x".join(map(str, (2, 4, *[6] * axes))))
        assert kinds(tmp_path / "out.onnx") == {"Conv": 1}
        assert error(path, tmp_path / "out.onnx", tensor(3, 1, 4, *[7] * axes)) < 1e-12


# What is not merged, and what stays


def refused(made: Any, tmp_path: Path) -> set[str]:
    """The codes of a model of which nothing is merged."""
    checkpoint = repfuse.load(written(made, tmp_path / "in.onnx"), input="2x4x9x10")
    plan = repfuse.plan(checkpoint.module, checkpoint.example_inputs)
    assert not plan.sites
    return {refusal.code for refusal in plan.refusals}


def test_a_bias_before_a_padded_convolution(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w1 i", "c"), node("Conv", "c w3", "a", pads=[1, 1, 1, 1]), node("Conv", "x w1", "d")]
    made = model([*nodes, node("Relu", "a", "e"), node("Add", "e d", "y")], {**WEIGHTS, "i": BIAS})
    assert "shift-before-padding" in refused(made, tmp_path)


@pytest.mark.parametrize("opset", [10, 17])
def test_a_bias_before_a_transposed_convolution(tmp_path: Path, opset: int) -> None:
    nodes = [node("Relu", "x", "r"), node("Conv", "r w1 i", "c")]
    nodes.append(node("ConvTranspose", "c k", "y", strides=[2, 2], pads=[1, 1, 1, 1]))
    path, out = (tmp_path / f"{name}.onnx" for name in ("in", "out"))
    made = model(nodes, {**WEIGHTS, "i": BIAS, "k": tensor(22, 4, 4, 4, 4)}, opset=opset)
    fused(written(made, path), out, "1x4x9x10")
    assert kinds(out) == {"Relu": 1, "Pad": 1, "ConvTranspose": 1}
    assert error(path, out, tensor(3, 2, 4, 3, 7)) < 1e-12
    onnx.checker.check_model(str(out), full_check=True)


def test_a_norm_of_the_batch(tmp_path: Path) -> None:
    norm = helper.make_node("BatchNormalization", ["a", *"gbmv"], ["y"], name="norm", training_mode=1)
    assert "training-norm" in refused(model([BRANCHES[0], norm], {"w3": W3, **NORM}), tmp_path)


def test_an_average_that_does_not_count_its_border(tmp_path: Path) -> None:
    pool = node("AveragePool", "x", "z", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    assert "pool-padding" in refused(model(*beside([pool])), tmp_path)


def test_an_activation_and_a_weight_that_is_an_input(tmp_path: Path) -> None:
    assert not refused(model([BRANCHES[0], node("Relu", "a", "b"), node("Add", "b x", "y")], {"w3": W3}), tmp_path)
    made = model([*BRANCHES, node("Add", "a c", "y")], WEIGHTS)
    made.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.DOUBLE, W1.shape))
    assert "computed-weight" in refused(made, tmp_path)
    assert any("w1" in note for note in repfuse.load(tmp_path / "in.onnx").notes)


GELU = [
    node("Conv", "x w1", "a"), node("Div", "a root", "b"), node("Erf", "b", "c"), node("Add", "c one", "d"),
    node("Mul", "a d", "e"), node("Mul", "e half", "f"), node("Conv", "f w1", "y"),
]  # fmt: skip
NORM_OF_LAYERS = [
    node("ReduceMean", "x", "a", axes=[-1]), node("Sub", "x a", "b"), node("Mul", "b b", "c"),
    node("ReduceMean", "c", "d", axes=[-1]), node("Add", "d eps", "e"), node("Sqrt", "e", "f"), node("Div", "b f", "g"),
    node("Mul", "g gamma", "h"), node("Add", "h beta", "i"), node("MatMul", "i p", "y"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "inner", "other"), [(GELU, "Erf", "Tanh"), (NORM_OF_LAYERS, "Sqrt", "Exp")])
def test_what_runtimes_compute_as_one_operator_stays(
    nodes: Sequence[Any], inner: str, other: str, tmp_path: Path
) -> None:
    """Its scale in the next layer would cost that operator: fused so, repvit_m1 got slower than it was."""
    held = {"w1": W1, "p": MATRICES["p"], "root": np.array(2**0.5), "eps": np.array(1e-5)}
    held |= {"one": np.array(1.0), "half": np.array(0.5), "gamma": NORM["g"], "beta": NORM["b"]}
    shape = {"shape": ("n", "t", 4)} if inner == "Sqrt" else {}
    size = "2x5x4" if shape else "2x4x9x10"
    names = {name for each in nodes for name in each.input}
    for inside, merges in ((inner, False), (other, True)):
        spelled = [onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes]
        next(each for each in spelled if each.op_type == inner).op_type = inside
        known = {name: array for name, array in held.items() if name in names}
        path = written(model(spelled, known, opset=13, **shape), tmp_path / f"{inside}.onnx")
        plan = fused(path, tmp_path / f"{inside}_out.onnx", size)
        assert bool(plan.sites) == merges, inside
        assert (kinds(path) == kinds(tmp_path / f"{inside}_out.onnx")) != merges


def test_weights_were_inputs_once(tmp_path: Path) -> None:
    made = model([*BRANCHES, node("Add", "a c", "y")], WEIGHTS, ir_version=3, opset=8)
    made.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, w.shape) for name, w in WEIGHTS.items()
    )
    path = written(made, tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10")
    result = onnx.load(tmp_path / "out.onnx")
    assert [each.name for each in result.graph.input] == ["x"]
    assert kinds(result) == {"Conv": 1}


def test_a_shared_tensor_stays_as_it_is(tmp_path: Path) -> None:
    nodes = [*BRANCHES, node("Add", "a c", "d"), node("Relu", "d", "e"), node("Conv", "e w3", "f", pads=[1, 1, 1, 1])]
    path = written(model([*nodes, node("Relu", "f", "y")], WEIGHTS), tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10")
    held = {each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert np.array_equal(held["w3"], W3)
    assert "w1" not in held
    assert error(path, tmp_path / "out.onnx", IMAGE) < 1e-12


def test_an_output_inside_a_block(tmp_path: Path) -> None:
    path = written(model([*BRANCHES, node("Add", "a c", "y")], WEIGHTS, outputs=("y", "c")), tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10", policy=Policy.ALWAYS)
    assert error(path, tmp_path / "out.onnx", IMAGE) < 1e-12
    assert [each.name for each in onnx.load(tmp_path / "out.onnx").graph.output] == ["y", "c"]


def test_outputs_that_become_one_value_or_the_input(tmp_path: Path) -> None:
    nodes = [*BRANCHES, node("Add", "a c", "y"), node("Identity", "y", "z"), node("Mul", "x one", "t")]
    made = model(nodes, {**WEIGHTS, "one": np.array(1.0)}, outputs=("y", "z", "t"))
    path = written(made, tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10")
    assert kinds(tmp_path / "out.onnx")["Conv"] == 1
    assert error(path, tmp_path / "out.onnx", IMAGE) == pytest.approx(0, abs=1e-12)


def test_a_copy_for_an_output_is_read_by_no_node_before_it(tmp_path: Path) -> None:
    nodes = [
        *BRANCHES,
        node("Add", "a c", "y"),
        node("Identity", "y", "z"),
        node("Sin", "y", "s"),
        node("Sin", "z", "t"),
    ]
    path = written(model(nodes, WEIGHTS, outputs=("s", "t", "z")), tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10")
    assert kinds(tmp_path / "out.onnx")["Conv"] == 1
    assert error(path, tmp_path / "out.onnx", IMAGE) < 1e-12


def test_what_only_a_merged_node_read_goes_and_what_nobody_read_stays(tmp_path: Path) -> None:
    held = {"w": tensor(0, 10, 6)} | {name: 1 + np.abs(tensor(n, 6)) for n, name in enumerate("gbmv", 1)}
    rows = [node("MatMul", "x w", "a"), node("Flatten", "a", "f", axis=2), node("BatchNormalization", "f g b m v", "n"),
            node("Shape", "a", "s"), node("Reshape", "n s", "y"), node("Relu", "x", "unread")]  # fmt: skip
    path = written(model(rows, held, shape=("n", 5, 10)), tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x5x10")
    assert kinds(tmp_path / "out.onnx") == {"MatMul": 1, "Add": 1, "Relu": 1}
    assert error(path, tmp_path / "out.onnx", tensor(9, 3, 5, 10)) < 1e-12


def conditional(value: str, output: str) -> Any:
    """An If, whose branches read a value from outside."""

    def branch(kind: str) -> Any:
        given = helper.make_tensor_value_info(f"{kind}_{output}", TensorProto.DOUBLE, None)
        return helper.make_graph([helper.make_node(kind, [value], [given.name])], kind, [], [given])

    return helper.make_node("If", ["yes"], [output], name="if", then_branch=branch("Neg"), else_branch=branch("Abs"))


def test_subgraphs_stay_and_what_is_around_them_is_merged(tmp_path: Path) -> None:
    nodes = [*BRANCHES, node("Add", "a c", "d"), conditional("d", "e"), node("Conv", "e w3", "f", pads=[1, 1, 1, 1]),
             node("Add", "f e", "y")]  # fmt: skip
    path = written(model(nodes, {**WEIGHTS, "yes": np.array(True)}), tmp_path / "in.onnx")
    plan = fused(path, tmp_path / "out.onnx", "2x4x9x10")
    assert len(plan.sites) == 2
    assert kinds(tmp_path / "out.onnx") == {"Conv": 2, "If": 1}
    assert error(path, tmp_path / "out.onnx", IMAGE) < 1e-12
    nodes = [BRANCHES[1], conditional("c", "e"), node("BatchNormalization", "c g b m v", "f"), node("Add", "e f", "y")]
    path = written(model(nodes, {"w1": W1, "yes": np.array(True), **NORM}), tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10")
    assert error(path, tmp_path / "out.onnx", IMAGE) < 1e-12


def test_loops_run_in_the_runtime(tmp_path: Path) -> None:
    """ONNX's own implementation runs this one otherwise; ONNX Runtime has no float64 for it."""
    names = (("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("s", TensorProto.FLOAT, None))
    given = [helper.make_tensor_value_info(*each) for each in names]
    gives = [helper.make_tensor_value_info(f"{name}2", *rest) for name, *rest in names[1:]]
    body = helper.make_graph([node("Relu", "s", "s2"), node("Identity", "go", "go2")], "body", given, gives)
    nodes = [*BRANCHES, node("Add", "a c", "d"), node("Loop", "three _ d", "e", body=body),
             node("Conv", "e w1", "f"), node("Add", "f e", "y")]  # fmt: skip
    held = {name: array.astype(np.float32) for name, array in WEIGHTS.items()} | {"three": np.array(3)}
    checkpoint = repfuse.load(written(model(nodes, held, dtype=np.float32), tmp_path / "in.onnx"), input="1x4x6x5")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    assert len(result.plan.sites) == 2
    saved = repfuse.save(checkpoint, result.module, tmp_path / "out.onnx", plan=result.plan)
    assert saved.verified is not None
    assert saved.verified.compared
    assert saved.verified.own is not None
    assert saved.verified.own < 1e-6


def test_functions_and_other_domains_stay(tmp_path: Path) -> None:
    body = [helper.make_node("Relu", ["p"], ["q"]), helper.make_node("Neg", ["q"], ["r"])]
    own = helper.make_function("mine", "Folded", ["p"], ["r"], body, [helper.make_opsetid("", 17)])
    nodes = [*BRANCHES, node("Add", "a c", "d"), node("Folded", "d", "y", domain="mine")]
    path = written(model(nodes, WEIGHTS, domains=["mine"], functions=[own]), tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10")
    assert kinds(tmp_path / "out.onnx") == {"Conv": 1, "Folded": 1}
    assert error(path, tmp_path / "out.onnx", IMAGE) < 1e-12


def test_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    nodes = [*BRANCHES, node("Add", "a c", "d"), node("Sin", "d", "e"), node("Conv", "e w3 i", "y", pads=[1, 1, 1, 1])]
    made = model(nodes, {**WEIGHTS, "i": BIAS}, opset=13)
    made.graph.doc_string = "about it"
    path = written(made, tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx", "2x4x9x10")
    result = onnx.load(tmp_path / "out.onnx")
    assert (result.producer_name, result.graph.doc_string, result.ir_version) == ("someone", "about it", 8)
    assert {each.key: each.value for each in result.metadata_props} == {"author": "nobody"}
    assert [(each.domain, each.version) for each in result.opset_import] == [("", 13)]
    assert result.graph.input == made.graph.input
    assert result.graph.output == made.graph.output
    assert [each for each in result.graph.node if each.name in ("Sin_e", "Conv_y")] == [*made.graph.node][-2:]
    new, *_ = result.graph.node
    assert (list(new.output), new.input[0]) == (["d"], "x")
    assert attributes(new)["pads"] == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dtypes_stay(dtype: Any, tmp_path: Path) -> None:
    held = {name: array.astype(dtype) for name, array in WEIGHTS.items()}
    path = written(model([*BRANCHES, node("Add", "a c", "y")], held, dtype=dtype), tmp_path / "in.onnx")
    checkpoint = repfuse.load(path, input="1x4x6x5")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    saved = repfuse.save(checkpoint, result.module, tmp_path / "out.onnx", plan=result.plan)
    assert saved.verified is not None
    assert saved.verified.compared
    assert {each.data_type for each in onnx.load(tmp_path / "out.onnx").graph.initializer} == {
        helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    }


def test_weights_that_are_stored_smaller_than_they_are_used(tmp_path: Path) -> None:
    held = {f"{name}h": array.astype(np.float16) for name, array in WEIGHTS.items()}
    casts = [node("Cast", f"{name}h", name, to=TensorProto.FLOAT) for name in WEIGHTS]
    path = written(model([*casts, *BRANCHES, node("Add", "a c", "y")], held, dtype=np.float32), tmp_path / "in.onnx")
    checkpoint = repfuse.load(path, input="1x4x6x5")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    saved = repfuse.save(checkpoint, result.module, tmp_path / "out.onnx", plan=result.plan)
    assert saved.verified is not None
    assert saved.verified.compared
    assert kinds(tmp_path / "out.onnx") == {"Conv": 1}


def test_bfloat16_is_merged_where_the_runtime_does_not_run_it(tmp_path: Path) -> None:
    made = model([*BRANCHES, node("Add", "a c", "y")], {})
    for each in (*made.graph.input, *made.graph.output):
        each.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for name, array in WEIGHTS.items():
        made.graph.initializer.append(helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.flatten()))
    checkpoint = repfuse.load(written(made, tmp_path / "in.onnx"), input="1x4x6x5")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    saved = repfuse.save(checkpoint, result.module, tmp_path / "out.onnx", plan=result.plan)
    assert saved.verified is not None
    assert saved.verified.tensors == 2
    assert "not run" in saved.verified.runtime or saved.verified.compared
    assert {each.data_type for each in onnx.load(tmp_path / "out.onnx").graph.initializer} == {TensorProto.BFLOAT16}


def test_what_the_runtime_has_no_kernels_for_is_converted_untimed(cli: Cli, tmp_path: Path) -> None:
    path, out = (
        written(model([*BRANCHES, node("Add", "a c", "y")], WEIGHTS), tmp_path / "in.onnx"),
        tmp_path / "out.onnx",
    )
    done = cli("convert", path, out, "--input", "1x4x6x5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["status"], report["timing"]) == ("converted", None)
    assert any(note.startswith("not timed: onnxruntime: ") for note in report["notes"])
    assert kinds(out) == {"Conv": 1}


def external(path: Path, out: str = "weights.bin") -> Path:
    """A file that has its weights in another."""
    made = model([*BRANCHES, node("Add", "a c", "y")], {**WEIGHTS, "w1": tensor(2, 4, 4, 1, 1)})
    onnx.save(made, path, save_as_external_data=True, location=out, size_threshold=0)
    return path


def test_weights_in_a_file_of_their_own_stay_in_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path, out = external(tmp_path / "in.onnx"), tmp_path / "out" / "fused.onnx"
    fused(path, out, "2x4x9x10")
    assert {each.name for each in out.parent.iterdir()} == {"fused.onnx", "fused.onnx.data"}
    assert error(path, out, IMAGE) < 1e-12
    with pytest.raises(RepfuseError, match="exists already"):
        out.unlink()
        checkpoint = repfuse.load(path, input="2x4x9x10")
        repfuse.save(checkpoint, checkpoint.module, out, verify=False)


def test_a_report_is_known_by_the_weights_beside_the_graph_too(cli: Cli, tmp_path: Path) -> None:
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    held = {name: array.astype(np.float32) for name, array in WEIGHTS.items()}
    made = model([*BRANCHES, node("Add", "a c", "y")], held, dtype=np.float32)
    onnx.save(made, path, save_as_external_data=True, location="in.onnx.data", size_threshold=0)
    done = cli("convert", path, out, "--input", "2x4x9x10", "--quiet")
    assert done.returncode == 0, done.stderr
    found = [said_beside(out), said_beside(out, path)]
    assert [each and each.input for each in found] == ["2x4x9x10"] * 2
    with (tmp_path / "out.onnx.data").open("r+b") as file:
        file.write(b"\0")
    assert said_beside(out) is None


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "..\\weights.bin"])
def test_weights_outside_of_the_folder_are_not_read(location: str, tmp_path: Path) -> None:
    path = external(tmp_path / "in.onnx")
    made = onnx.load(path, load_external_data=False)
    for each in made.graph.initializer:
        next(entry for entry in each.external_data if entry.key == "location").value = location
    onnx.save(made, path)
    with pytest.raises(RepfuseError, match="outside of its folder"):
        repfuse.load(path)


# Files that are no use


def test_damaged_files(tmp_path: Path) -> None:
    path = written(model([*BRANCHES, node("Add", "a c", "y")], WEIGHTS), tmp_path / "in.onnx")
    data = path.read_bytes()
    for number, damaged in enumerate((data[: len(data) // 2], data[:40], data[:20] + bytes(20) + data[40:])):
        path.write_bytes(damaged)
        with pytest.raises(RepfuseError) as caught:
            repfuse.load(path)
        assert caught.value.exit_code == 2, number
    path = external(tmp_path / "ext.onnx")
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(RepfuseError, match="damaged"):
        repfuse.load(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(RepfuseError, match="not there"):
        repfuse.load(path)


def test_quantised_and_unreadable_graphs(tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s", "y")]
    quantised = model(nodes, {"s": np.array(0.1, np.float32)}, dtype=np.float32)
    with pytest.raises(RepfuseError, match="quantised"):
        repfuse.load(written(quantised, tmp_path / "in.onnx"))
    with pytest.raises(RepfuseError, match="opset 6"):
        repfuse.load(written(model([node("Relu", "x", "y")], {}, opset=6), tmp_path / "in.onnx"))
    unknown = model(
        [*BRANCHES, node("Add", "a c", "d"), node("Nothing", "d", "y", domain="far")], WEIGHTS, domains=["far"]
    )
    checkpoint = repfuse.load(written(unknown, tmp_path / "in.onnx"), input="1x4x6x6")
    with pytest.raises(RepfuseError, match="does not run"):
        repfuse.plan(checkpoint.module, checkpoint.example_inputs)


def test_what_the_checker_does_not_like_is_converted_all_the_same(tmp_path: Path) -> None:
    made = model([*BRANCHES, node("Add", "a c", "y")], WEIGHTS)
    made.graph.name = ""  # ONNX Runtime takes it
    onnx.save(made, tmp_path / "in.onnx")
    fused(tmp_path / "in.onnx", tmp_path / "out.onnx", "1x4x6x6")
    assert kinds(tmp_path / "out.onnx") == {"Conv": 1}


def test_other_formats_say_why_not(tmp_path: Path) -> None:
    path = written(model([*BRANCHES, node("Add", "a c", "y")], WEIGHTS), tmp_path / "in.onnx")
    checkpoint = repfuse.load(path)
    for name in ("out.pt", "out.safetensors", "out.pt2"):
        with pytest.raises(RepfuseError, match="An ONNX file cannot become") as caught:
            repfuse.save(checkpoint, checkpoint.module, tmp_path / name)
        assert caught.value.exit_code == 2


def test_a_wrong_result_is_not_kept(tmp_path: Path) -> None:
    held = {name: array.astype(np.float32) for name, array in WEIGHTS.items()}
    path = written(model([*BRANCHES, node("Add", "a c", "y")], held, dtype=np.float32), tmp_path / "in.onnx")
    checkpoint = repfuse.load(path, input="1x4x6x5")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    with torch.no_grad():
        next(result.module.parameters()).add_(1e-3)
    with pytest.raises(RepfuseError, match="does not compute in ONNX Runtime") as caught:
        repfuse.save(checkpoint, result.module, tmp_path / "out.onnx", plan=result.plan)
    assert caught.value.exit_code == 1
    assert {each.name for each in tmp_path.iterdir()} == {"in.onnx"}


# As users do it


def test_the_commands(cli: Cli, tmp_path: Path) -> None:
    path = exported(
        randomised(Net(), dtype=torch.float32), [torch.randn(1, 3, 16, 16)], tmp_path / "in.onnx",
        dynamic_axes={"x0": {0: "n", 2: "h", 3: "w"}},
    )  # fmt: skip
    out = tmp_path / "out.onnx"
    done = cli("convert", path, out, "--input", "1x3x16x16", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["output"]["format"] == report["input"]["format"] == "onnx"
    verified = report["output"]["verified"]
    assert verified["runtime"].startswith("ONNX Runtime")
    assert {"the example", "batch 2", "size 1x1"} <= set(verified["compared"])
    assert verified["error"] <= verified["allowed"] <= 1e-4
    assert verified["tensors"] == 8
    assert report["timing"]["measurements"]
    assert kinds(out) == {"Conv": 3, "Relu": 2, "ReduceMean": 1, "Gemm": 1}
    assert [site["path"] for site in report["plan"]["sites"]] == [f"/blocks/blocks_{n}/Add_1_fused" for n in (0, 1)]
    done = cli("verify", path, out, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    verified = json.loads(done.stdout)
    assert verified["verdict"] == "same"
    assert [site["path"] for site in verified["proof"]["sites"]] == [site["path"] for site in report["plan"]["sites"]]


def changed(path: Path, name: str, by: float) -> None:
    """Multiply one number of a tensor in a file."""
    made = onnx.load(path)
    held = next(each for each in made.graph.initializer if each.name == name)
    numbers = numpy_helper.to_array(held).copy()
    numbers.flat[3] *= by
    held.CopyFrom(numpy_helper.from_array(numbers, name))
    onnx.save(made, path)


def by_plan(path: Path, out: Path, plan: Any, size: str = "2x4x9x10") -> Any:
    """What `repfuse verify` finds of two files by a plan, or without one."""
    options = ["--input", size]
    if plan:
        path.with_name("plan.json").write_text(plan.to_json())
        options += ["--plan", str(path.with_name("plan.json"))]
    done = CliRunner().invoke(app, ["verify", str(path), str(out), *options, "--json"])
    assert done.exit_code in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_two_files_are_compared_by_the_plan(tmp_path: Path) -> None:
    nodes = [*BRANCHES, node("Add", "a c", "d"), node("Relu", "d", "e"), node("Conv", "e k i", "y")]
    held = {name: x.astype(np.float32) for name, x in {**WEIGHTS, "k": W1, "i": BIAS}.items()}
    path, out = written(model(nodes, held, dtype=np.float32), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    plan = fused(path, out, "2x4x9x10")
    found = by_plan(path, out, plan)
    assert found["verdict"] == "same" and len(found["proof"]["sites"]) == 1 and not found["notes"]
    changed(out, "Add_d_fused.weight", 1 + 2**-22)  # two units in the last place, which the outputs hide
    assert by_plan(path, out, None)["verdict"] == "same"
    found = by_plan(path, out, plan)
    assert found["verdict"] == "different" and "Add_d_fused" in found["reason"]
    fused(path, out, "2x4x9x10")
    changed(out, "k", 1 + 2**-22)  # which is no part of the plan
    found = by_plan(path, out, plan)
    assert found["proof"] is None and "compared as a whole" in found["notes"][-1]
    fused(path, out, "2x4x9x10")
    made = onnx.load(out)
    made.graph.node.append(node("Identity", "y", "z"))
    onnx.save(made, out)
    assert "compared as a whole" in by_plan(path, out, plan)["notes"][-1]


@pytest.mark.parametrize("settings", [{}, {"keep_affine": True}])
def test_layers_of_all_kinds_are_compared_by_the_plan(settings: dict[str, Any], tmp_path: Path) -> None:
    """A Gemm, a MatMul and an Add, a transposed convolution, each of them with its weights as ONNX has them."""
    rows = [row for row in SPELLINGS if row.name in ("Gemm and MatMul with Add", "MatMul of tokens", "ConvTranspose")]
    for row in rows:
        held = {name: x.astype(np.float32 if x.dtype == np.float64 else x.dtype) for name, x in row.tensors.items()}
        made = model(row.nodes, held, shape=row.shape, dtype=np.float32)
        size = "x".join(map(str, row.given.shape))
        path, out = written(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
        plan = fused(path, out, size, **settings)
        found = by_plan(path, out, plan, size)
        assert found["verdict"] == "same" and found["proof"]["passed"] and not found["notes"], row.name


@pytest.mark.slow
def test_bench_and_inspect(cli: Cli, tmp_path: Path) -> None:
    path = exported(randomised(Net(), dtype=torch.float32), [torch.randn(1, 3, 16, 16)], tmp_path / "in.onnx")
    fused(path, tmp_path / "out.onnx")
    done = cli("bench", path, tmp_path / "out.onnx", "--seconds", "0.5", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["before"]["macs"] > json.loads(done.stdout)["after"]["macs"] > 0
    done = cli("inspect", path, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["plan"]["sites"]) == 2
    done = cli("convert", path, tmp_path / "no.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "An ONNX file cannot become" in done.stderr


class Block(torch.nn.Module):
    """As RepVGG's authors write it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(8))
        self.point = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1, bias=False), torch.nn.BatchNorm2d(8))
        self.skip = torch.nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.dense(x) + self.point(x) + self.skip(x))


class Net(torch.nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Sequential(Block(), Block())
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_a_file_that_is_misread_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {name: array.astype(np.float32) for name, array in WEIGHTS.items()}
    nodes = [*BRANCHES, node("Add", "a c", "d"), node("Relu", "d", "y")]
    monkeypatch.setitem(operators.ROWS, "Relu", lambda _: torch.nn.functional.relu6)
    checkpoint = repfuse.load(written(model(nodes, held, dtype=np.float32), tmp_path / "in.onnx"), input="1x4x6x5")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    with pytest.raises(RepfuseError, match="was not understood") as caught:
        repfuse.save(checkpoint, result.module, tmp_path / "out.onnx", plan=result.plan)
    assert caught.value.exit_code == 1
    assert {each.name for each in tmp_path.iterdir()} == {"in.onnx"}
