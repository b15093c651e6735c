"""Random ONNX graphs of the operators that merge: the written file computes in float64 what the original does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from support.onnx_models import error, fused, kinds, model, node, tensor  # noqa: E402

C = 4
SIZES = ((1, C, 6, 7), (2, C, 1, 3), (1, C, 9, 4))


@dataclass
class Graph:
    """A graph under way: every value has the shape of the input."""

    draw: Any
    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    values: list[str] = field(default_factory=lambda: ["x"])

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def value(self) -> str:
        """One of the values, rather a late one."""
        return self.draw(st.sampled_from([*self.values, *self.values[-2:]]))

    def held(self, *shape: int, positive: bool = False) -> str:
        """A tensor; sometimes one that is there already."""
        alike = [
            name
            for name, array in self.tensors.items()
            if array.dtype == float and array.shape == shape and positive == bool((array > 0).all())
        ]
        if alike and self.draw(st.integers(0, 5)) == 0:
            return self.draw(st.sampled_from(alike))
        name, array = f"w{len(self.tensors)}", tensor(len(self.tensors), *shape)
        self.tensors[name] = np.abs(array) + 0.5 if positive else array
        return name

    def numbers(self, *numbers: int) -> str:
        name = f"w{len(self.tensors)}"
        self.tensors[name] = np.array(numbers)
        return name

    def add(self, kind: str, inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(kind, inputs, name, **attributes))
        return name

    # Operators that keep the shape

    def conv(self) -> str:
        kernel, dilation, group = self.pick(1, 1, 3, 3, 5), self.pick(1, 1, 2), self.pick(1, 1, 2, C)
        weight, bias = self.held(C, C // group, kernel, kernel), self.held(C) if self.pick(0, 1) else ""
        border = kernel // 2 * dilation
        how = {"auto_pad": self.pick("SAME_UPPER", "SAME_LOWER")} if self.pick(0, 0, 1) else {"pads": [border] * 4}
        return self.add("Conv", f"{self.value()} {weight} {bias}", group=group, dilations=[dilation] * 2, **how)

    def padded(self) -> str:
        amounts = self.numbers(0, 0, 1, 0, 0, 0, 1, 2)
        x = self.add("Pad", f"{self.value()} {amounts}")
        return self.add("Conv", f"{x} {self.held(C, C, 3, 3)}")

    def transposed(self) -> str:
        return self.add("ConvTranspose", f"{self.value()} {self.held(C, C, 3, 3)}", pads=[1] * 4)

    def norm(self) -> str:
        names = " ".join([self.held(C), self.held(C), self.held(C), self.held(C, positive=True)])
        return self.add("BatchNormalization", f"{self.value()} {names}", epsilon=1e-3)

    def arithmetic(self) -> str:
        shape = self.pick((C, 1, 1), (1, C, 1, 1), (), (1,))
        kind = self.pick("Add", "Sub", "Mul", "Div")
        return self.add(kind, f"{self.value()} {self.held(*shape, positive=kind == 'Div')}")

    def total(self) -> str:
        kind = self.pick("Add", "Add", "Sub", "Sum")
        inputs = [self.value() for _ in range(3 if kind == "Sum" else 2)]
        return self.add(kind, " ".join(inputs))

    def average(self) -> str:
        counts = self.pick(0, 1)
        return self.add("AveragePool", self.value(), kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=counts)

    def halves(self) -> str:
        x = self.value()
        first = self.add("Slice", f"{x} {self.numbers(0)} {self.numbers(2)} {self.numbers(1)}")
        second = self.add("Slice", f"{x} {self.numbers(2)} {self.numbers(C)} {self.numbers(1)}")
        second = self.add("Conv", f"{second} {self.held(2, 2, 1, 1)}") if self.pick(0, 1) else second
        return self.add("Concat", f"{first} {second}", axis=1)

    def ordered(self) -> str:
        return self.add("Gather", f"{self.value()} {self.numbers(*self.draw(st.permutations(range(C))))}", axis=1)

    def other(self) -> str:
        return self.add(self.pick("Relu", "Identity", "Sin", "Neg", "Dropout"), self.value())


KINDS = (
    Graph.conv, Graph.conv, Graph.conv, Graph.norm, Graph.total, Graph.total, Graph.arithmetic, Graph.padded,
    Graph.transposed, Graph.average, Graph.halves, Graph.ordered, Graph.other,
)  # fmt: skip


@st.composite
def models(draw: Any) -> Any:
    graph = Graph(draw)
    for _ in range(draw(st.integers(2, 8))):
        graph.values.append(draw(st.sampled_from(KINDS))(graph))
    outputs = list(dict.fromkeys([graph.values[-1], graph.value()]))
    outputs = [name for name in outputs if name != "x"]
    return model(graph.nodes, graph.tensors, outputs=outputs, opset=draw(st.sampled_from([14, 15, 18])))


def check(made: Any) -> None:
    onnx.checker.check_model(made, full_check=True)
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(made, path)
        fused(path, out, "1x4x6x7")
        onnx.checker.check_model(str(out), full_check=True)
        assert kinds(out).total() <= kinds(path).total()
        result = onnx.load(out)
        assert result.graph.output == made.graph.output
        assert result.graph.input == made.graph.input
        kept = {each.name: each for each in made.graph.initializer}
        assert all(each == kept[each.name] for each in result.graph.initializer if each.name in kept)
        for seed, size in enumerate(SIZES):
            assert error(path, out, tensor(seed, *size)) < 1e-10, onnx.printer.to_text(made.graph)


@given(models())
@settings(max_examples=15)
def test_random_graphs(made: Any) -> None:
    check(made)


@pytest.mark.slow
@given(models())
@settings(max_examples=2000)
def test_many_random_graphs(made: Any) -> None:
    check(made)
