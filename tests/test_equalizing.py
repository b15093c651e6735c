"""Equalised networks: what rounding leaves of them, that they compute the same, and what is said of them."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLES, Cli
from safetensors.torch import load_file, save_file
from support.agreement import error, image, randomised
from support.snapshots import check, masked
from torch import Tensor, nn

import repfuse
from repfuse.quantization import rounded

DIGITS = SAMPLES / "repvgg_digits.pt"
STATE, CLASS = SAMPLES / "repvgg_digits_state_dict.pth", ("--model", "repfuse.samples:DigitsRepVGG")
HELD_OUT = SAMPLES / "digits_heldout.safetensors"
X = image(2, 3, 9, 8, dtype=torch.float32)


class Rounded(nn.Module):
    """A layer whose input is rounded to 8 bits between ``least`` and ``most``, as quantisers calibrate it."""

    def __init__(self, layer: nn.Module, least: float, most: float) -> None:
        super().__init__()
        self.layer, self.least, self.most = layer, min(least, 0.0), max(most, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        step = (self.most - self.least) / 255
        zero = round(-self.least / step)
        return self.layer(((x / step).round().clamp(-zero, 255 - zero)) * step)


def layers(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]


def with_weights_of(bits: int, model: nn.Module) -> nn.Module:
    """A copy with weights of so many bits, each tensor in steps of one size."""
    made = copy.deepcopy(model)
    for layer in layers(made):
        layer.weight.data = rounded(layer.weight.data, bits)
    return made


@torch.no_grad()
def with_values_of_8_bits(model: nn.Module, calibration: Tensor) -> nn.Module:
    """A copy in which what layers read is rounded too."""
    made, seen = copy.deepcopy(model), {}
    hooks = [layer.register_forward_pre_hook(lambda m, x: seen.update({m: x[0].aminmax()})) for layer in layers(made)]
    made(calibration)
    for hook in hooks:
        hook.remove()
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if child in seen:
                setattr(parent, name, Rounded(child, *map(float, seen[child])))
    return made


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    held_out = load_file(HELD_OUT)
    return 100 * float((model(held_out["inputs"]).argmax(1) == held_out["labels"]).double().mean())


@pytest.fixture(scope="module")
def training() -> Tensor:
    """The images of scikit-learn that are not held out, read from its file: it takes a second to import."""
    package = importlib.util.find_spec("sklearn")
    assert package and package.origin
    numbers = np.loadtxt(Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
    images = torch.tensor(numbers[:, :-1], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    held_out = {image.numpy().tobytes() for image in load_file(HELD_OUT)["inputs"]}
    return torch.stack([image for image in images if image.numpy().tobytes() not in held_out])


@pytest.fixture(scope="module")
def fused() -> nn.Module:
    checkpoint = repfuse.load(DIGITS)
    return repfuse.fuse(checkpoint.module, checkpoint.example_inputs).module


@pytest.fixture(scope="module")
def equalised(cli: Cli, training: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The digits as the command equalises them, which takes a second, and what it says."""
    folder = tmp_path_factory.mktemp("equalised")
    save_file({"inputs": training[:256]}, folder / "data.safetensors")
    data = ("--data", folder / "data.safetensors")
    done = cli("convert", STATE, folder / "out.safetensors", *CLASS, "--equalize", *data, "--json")
    return folder / "out.safetensors", json.loads(done.stdout)


def test_digits_of_4_bits(fused: nn.Module, equalised: tuple[Path, dict[str, Any]]) -> None:
    assert accuracy(with_weights_of(4, fused)) < 75
    assert accuracy(with_weights_of(4, repfuse.load(equalised[0]).module)) >= 90
    assert all(gain["after"] > gain["before"] for gain in equalised[1]["equalization"]["gains"])


def test_digits_of_8_bits(fused: nn.Module, equalised: tuple[Path, dict[str, Any]], training: Tensor) -> None:
    both = with_values_of_8_bits(with_weights_of(8, repfuse.load(equalised[0]).module), training[:256])
    assert accuracy(both) >= accuracy(fused) - 0.3


@pytest.mark.slow
def test_a_second_time_changes_little(fused: nn.Module, training: Tensor) -> None:
    """There is no more to gain than luck in rounding."""
    once = repfuse.equalize(fused, [training[:1]], training).module
    again = repfuse.equalize(once, [training[:1]], training).equalization
    assert all(gain.after - gain.before < 4 for gain in again.gains)
    assert all(tensor.least > 0.5 and tensor.most < 2 for tensor in again.tensors)


def uneven(seed: int = 0) -> nn.Module:
    """A network whose channels are up to a thousand times as large as others, as folded norms leave them."""
    blocks = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)]
    model = randomised(nn.Sequential(*blocks), seed, torch.float32)
    scales = image(8, seed=seed, dtype=torch.float32).mul(2).exp()
    with torch.no_grad():
        model[0].weight *= scales[:, None, None, None]
        model[0].bias *= scales
        model[2].weight /= scales.view(2, 1, 4).expand(2, 4, 4).reshape(8, 4, 1, 1)
    return model


def test_powers_of_two_compute_the_same_bits() -> None:
    model = uneven()
    made = repfuse.equalize(model, [X], powers_of_two=True)
    assert made.equalization.tensors and made.equalization.gains[0].after > made.equalization.gains[0].before + 3
    for seed in range(4):
        x = image(2, 3, 9 + seed, 8, seed=seed, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(model(x), made.module(x))
    for one, other in zip(model.parameters(), made.module.parameters(), strict=True):
        assert set((other / one).log2().frac().flatten().tolist()) == {0.0}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.float64, torch.float32))]
)
def test_the_rest_of_the_network_stays(dtype: torch.dtype) -> None:
    model = uneven().to(dtype)
    model[0].weight.requires_grad_(False)
    model[4].weight.data = model[4].weight.data.contiguous(memory_format=torch.channels_last)
    model.names, model.also = ["a"], [model[2]]
    before = copy.deepcopy(model)
    made = repfuse.equalize(model, [X.to(dtype)])
    assert made.equalization.tensors
    assert all(map(torch.equal, before.state_dict().values(), model.state_dict().values()))
    module = made.module
    assert module.also[0] is module[2] and module.names == ["a"] and type(module) is nn.Sequential
    assert {x.dtype for x in module.parameters()} == {dtype}
    assert not module[0].weight.requires_grad and module[2].weight.requires_grad
    assert module[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert error(model, module, X.to(dtype)) < 4 * torch.finfo(dtype).eps * 10


@cache
def evened():
    return repfuse.equalize(uneven(), [X], X)


def test_it_is_the_same_each_time() -> None:
    one, other = evened(), repfuse.equalize(uneven(), [X], X)
    assert one.equalization == other.equalization
    assert all(map(torch.equal, one.module.state_dict().values(), other.module.state_dict().values()))


def test_without_gradients_each_weight_counts_alike() -> None:
    class Blind(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    done = repfuse.equalize(Blind(*uneven()), [X], X).equalization
    assert done.gains[0].after > done.gains[0].before + 3
    assert "each weight counted alike, for want of gradients" in done.notes[0]
    assert not evened().equalization.notes


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.SiLU(), nn.Sigmoid()])
def test_a_network_without_free_scales_is_left_as_it_is(between: nn.Module) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 1)))
    made = repfuse.equalize(model, [X.double()])
    assert made.module is model and not made.equalization.tensors and made.equalization.scales == 0
    assert [(each.code, each.where) for each in made.equalization.refusals] == [("not-homogeneous", "1")]


# On the command line


def test_what_is_printed(cli: Cli, tmp_path: Path) -> None:
    torch.save(uneven(), tmp_path / "in.pt")
    done = cli("convert", "in.pt", "out.pt", "--equalize", "--input", "2x3x9x8", cwd=tmp_path, columns=300)
    check("equalize", masked(done.stdout + done.stderr, tmp_path))
    report = json.loads((tmp_path / "out.pt.report.json").read_text())
    found = report["equalization"]
    assert found["comparison"]["passed"] and found["comparison"]["error"] < 1e-12 and report["plan"]["equalized"]
    assert {tensor["name"] for tensor in found["tensors"]} == {
        f"{n}.{each}" for n in (0, 2) for each in ("weight", "bias")
    } | {"4.weight"}


def test_digits_as_files(cli: Cli, tmp_path: Path, equalised: tuple[Path, dict[str, Any]]) -> None:
    """With the proof of the merge before it, and verified later as a whole."""
    out, report = equalised
    assert report["proof"]["passed"] and len(report["proof"]["sites"]) == 5 and report["drift"]["passed"]
    assert report["equalization"]["inputs"] == "data" and report["equalization"]["comparison"]["error"] < 1e-12
    verified = cli("verify", STATE, out, *CLASS)
    assert verified.returncode == 0 and "it is compared as a whole" in verified.stderr
    again = cli("convert", out, tmp_path / "again.safetensors", "--json")
    assert json.loads(again.stdout)["status"] == "nothing-to-fuse"


def test_a_network_of_relu6_is_refused(cli: Cli, tmp_path: Path) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1)), dtype=torch.float32)
    torch.save(model, tmp_path / "in.pt")
    done = cli("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--equalize", "--input", "1x3x9x8")
    assert done.returncode == 0 and not (tmp_path / "out.pt").exists()
    assert "not-homogeneous" in done.stdout and "no channels between layers can be scaled" in done.stdout
    assert cli("explain", "not-homogeneous").returncode == 0


def test_how_to_equalise_needs_that(cli: Cli, tmp_path: Path) -> None:
    done = cli("convert", DIGITS, tmp_path / "out.pt", "--powers-of-two")
    assert done.returncode == 2 and "Give --equalize too." in done.stderr and not any(tmp_path.iterdir())


def test_graphs_of_onnx(cli: Cli, tmp_path: Path) -> None:
    """Nothing else in the file changes."""
    onnx = pytest.importorskip("onnx")
    from support.onnx_models import exported

    path = exported(uneven(), [X], tmp_path / "in.onnx")
    done = cli("convert", path, tmp_path / "out.onnx", "--equalize", "--input", "2x3x9x8")
    assert done.returncode == 0, done.stderr + done.stdout
    before, after = onnx.load(path).graph, onnx.load(tmp_path / "out.onnx").graph
    assert [node.SerializeToString() for node in before.node] == [node.SerializeToString() for node in after.node]
    held = {tensor.name: tensor.SerializeToString() for tensor in before.initializer}
    changed = {tensor.name for tensor in after.initializer if held[tensor.name] != tensor.SerializeToString()}
    assert changed == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}


@pytest.mark.parametrize("shared", [False, True])
def test_a_constant_that_another_node_reads_stays(shared: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from support.onnx_models import error as difference
    from support.onnx_models import model, node, tensor

    big = np.array([100.0, 1, 10, 1]).reshape(4, 1, 1, 1)
    held = {
        "v": tensor(1, 4, 4, 3, 3) * big,
        "w": tensor(2, 4, 4, 1, 1) / big.reshape(1, 4, 1, 1),
        "s": np.array([], np.int64),
    }
    nodes = [node("Conv", "x v", "a"), node("Relu", "a", "r"), node("Conv", "r w", "b")]
    nodes += [
        node("ReduceMax", "v", "m", keepdims=0),
        node("Add", "b m" if shared else "b b", "y"),
    ]
    path = tmp_path / "in.onnx"
    onnx.save(model(nodes, {name: x for name, x in held.items() if name != "s"}), path)
    checkpoint = repfuse.load(path, input="2x4x8x8")
    made = repfuse.equalize(checkpoint.module, checkpoint.example_inputs)
    assert bool(made.equalization.tensors) is not shared
    assert {each.code for each in made.equalization.refusals} == ({"unwritable-weight"} if shared else set())
    repfuse.save(checkpoint, made.module, tmp_path / "out.onnx", verify=False)
    assert difference(path, tmp_path / "out.onnx", tensor(3, 2, 4, 8, 8)) < 1e-12
