"""An ONNX file to damage: an operator of each kind that repfuse is told something of before the graph runs."""

from __future__ import annotations

import numpy as np
from support.onnx_models import model, node, tensor


def graph() -> bytes:
    """A valid file."""
    nodes = [
        node("Conv", "x w3", "a", pads=[1, 1, 1, 1]),
        node("Conv", "x w1", "c"),
        node("Add", "a c", "d"),
        node("ConstantOfShape", "s", "e"),
        node("Add", "d e", "f"),
        node("Reshape", "f t", "g"),
        node("Transpose", "g", "h", perm=[0, 2, 1, 3]),
        node("Gather", "h k", "i", axis=1),
        node("CumSum", "i z", "y"),
    ]
    held = {"w3": tensor(1, 4, 4, 3, 3), "w1": tensor(2, 4, 4, 1, 1), "s": np.array([4, 1, 1]), "z": np.array(0)}
    held |= {"t": np.array([0, 2, 2, -1]), "k": np.array([1, 0])}
    return model(nodes, held, shape=(1, 4, 5, 5), dtype=np.float64).SerializeToString()
