"""Each operator that is read as functions of torch computes what ONNX Runtime does, whatever its attributes say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from support.onnx_models import model, node, tensor  # noqa: E402

import repfuse  # noqa: E402
from repfuse.checkpoint.onnx_graph.network import OnnxNode  # noqa: E402

F = np.float32
X = tensor(1, 2, 4, 6, 9).astype(F)
W = tensor(2, 4, 4, 3, 2).astype(F)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, F)


CASES: list[tuple[str, str, dict[str, np.ndarray], dict[str, Any]]] = [
    ("Conv", "x w", {"w": W}, {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
    ("Conv", "x w", {"w": W}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", "x w", {"w": W}, {"auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", "x w", {"w": W}, {"strides": [2, 3], "pads": [1, 0, 1, 1], "output_padding": [1, 0]}),
    ("ConvTranspose", "x w", {"w": W[:, :2]}, {"group": 2, "strides": [2, 1], "dilations": [1, 2]}),
    *(("AveragePool", "x", {}, {"kernel_shape": [3, 2], "pads": pads, "count_include_pad": counts, "strides": [2, 1]})
      for pads in ([1, 1, 1, 1], [1, 0, 0, 1]) for counts in (0, 1)),
    ("MaxPool", "x", {}, {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2], "strides": [2, 2]}),
    ("MaxPool", "x", {}, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("Pad", "x p v", {"p": ints(0, 1, 0, -1, 0, 0, 2, 1), "v": np.array(0.5, F)}, {}),
    ("Pad", "x p", {"p": ints(0, 0, 2, 1, 0, 0, 1, 3)}, {"mode": "reflect"}),
    ("Pad", "x p", {"p": ints(0, 0, 2, 1, 0, 0, 1, 3)}, {"mode": "edge"}),
    ("Slice", "x s e a t", {"s": ints(1, -5), "e": ints(2**63 - 1, -1), "a": ints(1, -1), "t": ints(2, 1)}, {}),
    ("Slice", "x s e a t", {"s": ints(5), "e": ints(-100), "a": ints(2), "t": ints(-1)}, {}),
    ("Gather", "x i", {"i": np.array(-2)}, {"axis": 1}),
    ("Gather", "x i", {"i": np.array([[0, 1], [2, -1]])}, {"axis": 1}),
    ("Reshape", "x s", {"s": ints(0, 2, -1, 9)}, {}),
    *(("Flatten", "x", {}, {"axis": axis}) for axis in (0, 1, 2, -1)),
    ("Unsqueeze", "x a", {"a": ints(-1, 0)}, {}),
    ("Transpose", "x", {}, {}),
    ("Expand", "x s", {"s": ints(2, 1, 1, 1)}, {}),
    *(("DepthToSpace", "x", {}, {"blocksize": 2, "mode": mode}) for mode in ("DCR", "CRD")),
    ("SpaceToDepth", "x", {}, {"blocksize": 3}),
    ("Softmax", "x", {}, {"axis": 1}),
    ("LogSoftmax", "x", {}, {}),
    *((f"Reduce{kind}", "x", {}, {"axes": [2, -1], "keepdims": 0}) for kind in ("Mean", "Max", "Min", "L1", "L2")),
    ("ReduceSum", "x a", {"a": ints(-2)}, {}),
    *(("Resize", "x _ s", {"s": floats(1, 1, 2, 3)}, {"mode": "nearest"} | how) for how in (
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, {},
        {"coordinate_transformation_mode": "align_corners"},
    )),
    ("Resize", "x _ s", {"s": floats(1, 1, 2, 3)}, {"mode": "linear"}),
    ("Resize", "x _ _ s", {"s": ints(2, 4, 9, 12)}, {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
    ("Clip", "x lo", {"lo": np.array(-0.5, F)}, {}),
    *((kind, "x", {}, {}) for kind in ("HardSigmoid", "HardSwish", "Elu", "LeakyRelu", "Softplus", "Mish", "Erf")),
    ("HardSigmoid", "x", {}, {"alpha": 1 / 6, "beta": 0.5}),
    ("PRelu", "x s", {"s": tensor(3, 4, 1, 1).astype(F)}, {}),
    ("Where", "c x z", {"c": np.array([[[True], [False]] * 3]), "z": np.array(2.0, F)}, {}),
    ("GlobalAveragePool", "x", {}, {}),
    ("GlobalMaxPool", "x", {}, {}),
    ("LayerNormalization", "x w b", {"w": tensor(4, 9).astype(F), "b": tensor(5, 9).astype(F)}, {"axis": -1}),
    ("InstanceNormalization", "x w b", {"w": tensor(4, 4).astype(F), "b": tensor(5, 4).astype(F)}, {}),
    ("Einsum", "x w", {"w": tensor(4, 4, 3).astype(F)}, {"equation": "nchw,ck->nkhw"}),
    ("Sum", "x x x", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "inputs", "tensors", "attributes"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)]
)
def test_operator(
    kind: str, inputs: str, tensors: dict[str, np.ndarray], attributes: dict[str, Any], tmp_path: Path
) -> None:
    opset = 18 if kind in ("Mish",) else 17
    made = model([node(kind, inputs, "y", **attributes)], tensors, shape=(2, 4, 6, 9), opset=opset, dtype=F)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(made, tmp_path / "in.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "in.onnx"), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": X})
    network = repfuse.load(tmp_path / "in.onnx").module
    found = network(torch.from_numpy(X)).numpy()
    assert found.shape == wanted.shape
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(part, OnnxNode) for part in network.modules()) == 1 or kind in ("Slice", "Gather", "Resize")
