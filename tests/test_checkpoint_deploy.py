"""Files and networks in deploy mode: recognised by what does not match, and told from other mistakes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLES, Cli
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.loading import load
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite
from repfuse.saving import save

NET = """
import torch
from torch import nn


def conv(inputs, outputs, kernel):
    made = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(made, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, deploy):
        super().__init__()
        if deploy:
            self.FUSED = nn.Conv2d(4, 4, 3, padding=1)
        else:
            self.ONE, self.TWO = conv(4, 4, 3), conv(4, 4, 1)

    def forward(self, x):
        if hasattr(self, "FUSED"):
            return self.FUSED(x).relu()
        return (self.ONE(x) + self.TWO(x)).relu()


class Net(nn.Module):
    def __init__(self, deploy=False, bodies=3, mixed=False):
        super().__init__()
        self.stem = conv(3, 4, 3)
        self.stages = nn.Sequential(*[Block(deploy if not mixed else i == 0) for i in range(bodies)])

    def forward(self, x):
        return self.stages(self.stem(x))
"""
NAMES = {  # the fused layer, and two branches
    "RepVGG": ("rbr_reparam", "rbr_dense", "rbr_1x1"),
    "MobileOne": ("reparam_conv", "conv_kxk", "conv_scale"),
    "DBB": ("dbb_reparam", "dbb_origin", "dbb_1x1"),
    "RepLKNet": ("lkb_reparam", "lkb_origin", "small_conv"),
    "nobody's": ("whole", "wide", "narrow"),
}


@pytest.fixture(params=NAMES)
def net(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A file that builds a network with the names of one family; gives the family and the --model."""
    text = NET
    for word, name in zip(("FUSED", "ONE", "TWO"), NAMES[request.param], strict=True):
        text = text.replace(word, name)
    path = tmp_path / f"net_{request.param.strip(chr(39)).lower().replace(chr(39), '')}.py"
    path.write_text(text)
    return request.param, f"{path}:Net"


def state(spec: str, **arguments: Any) -> dict[str, Tensor]:
    path, _, name = spec.rpartition(":")
    return runpy.run_path(path)[name](**arguments).state_dict()


def refused(path: Path, spec: str, *arguments: str) -> RepfuseError:
    with pytest.raises(RepfuseError) as error:
        load(path, model=spec, model_args=arguments)
    assert error.value.exit_code == 2
    return error.value


def test_a_fused_file_for_a_network_of_branches(net: tuple[str, str], tmp_path: Path) -> None:
    family, spec = net
    torch.save(state(spec, deploy=True), tmp_path / "x.pt")
    error = refused(tmp_path / "x.pt", spec)
    known = family != "nobody's"
    assert f"{'is' if known else 'looks'} fused already (deploy mode)" in error.what
    assert f"stages.0.{NAMES[family][0]}.weight" in error.why
    assert f"stages.0.{NAMES[family][1]}.0.weight" in error.why
    assert "--model-arg deploy=True" in error.hint
    checkpoint = load(tmp_path / "x.pt", model=spec, model_args=["deploy=True"])
    assert ("fused already" in checkpoint.fused_already) == known


def test_a_file_of_branches_for_a_fused_network(net: tuple[str, str], tmp_path: Path) -> None:
    family, spec = net
    torch.save(state(spec), tmp_path / "x.pt")
    error = refused(tmp_path / "x.pt", spec, "deploy=True")
    assert "has the branches of training" in error.what
    assert NAMES[family][1] in error.why
    assert NAMES[family][0] in error.why
    assert "without --model-arg deploy" in error.hint
    assert load(tmp_path / "x.pt", model=spec).fused_already == ""


def test_a_prefix_does_not_hide_the_mode(net: tuple[str, str], tmp_path: Path) -> None:
    _, spec = net
    held = {f"module.{name}": tensor for name, tensor in state(spec, deploy=True).items()}
    torch.save({"state_dict": held}, tmp_path / "x.pt")
    assert "fused already" in refused(tmp_path / "x.pt", spec).what


def test_a_file_that_is_fused_in_part_lists_both_kinds(net: tuple[str, str], tmp_path: Path) -> None:
    family, spec = net
    torch.save(state(spec, mixed=True), tmp_path / "x.pt")
    for arguments in ((), ("deploy=True",)):
        error = refused(tmp_path / "x.pt", spec, *arguments)
        if family == "nobody's":
            assert "do not fit" in error.what or "fused" in error.what
            continue
        assert "fused in part" in error.what
        assert f"stages.0.{NAMES[family][0]}" in error.why
        assert f"stages.1.{NAMES[family][1]}" in error.why
    checkpoint = load(tmp_path / "x.pt", model=spec, model_args=["mixed=True"])
    assert ("some of its blocks are fused already" in checkpoint.fused_already) == (family != "nobody's")


def test_without_a_known_name_or_a_flag_it_only_looks_so(tmp_path: Path) -> None:
    plain = nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))})
    torch.save(plain.state_dict(), tmp_path / "x.pt")
    layers = "nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)"
    (tmp_path / "plain_net.py").write_text(
        f"from torch import nn\ndef net(): return nn.ModuleDict(dict(features=nn.Sequential({layers})))\n"
    )
    error = refused(tmp_path / "x.pt", f"{tmp_path / 'plain_net.py'}:net")
    assert "looks fused already" in error.what
    assert "If not, check the name" in error.hint


@pytest.mark.parametrize("spec", ["repfuse.samples:NotebookBlock", "torchvision:resnet18"])
def test_another_network_is_not_said_to_be_fused(spec: str, tmp_path: Path) -> None:
    error = refused(SAMPLES / "repvgg_digits_state_dict.pth", spec)
    assert "do not fit" in error.what


def test_timm_names_and_flags(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("fastvit_t8", num_classes=3).eval()
    torch.save(timm.utils.reparameterize_model(network).state_dict(), tmp_path / "x.pt")
    error = refused(tmp_path / "x.pt", "timm:fastvit_t8", "num_classes=3")
    assert "stem.0.reparam_conv.weight" in error.why
    assert "inference_mode=True" in error.hint
    assert (
        "fused already"
        in load(
            tmp_path / "x.pt", model="timm:fastvit_t8", model_args=["num_classes=3", "inference_mode=True"]
        ).fused_already
    )
    small = timm.create_model("repghostnet_050", num_classes=3).eval()
    torch.save(timm.utils.reparameterize_model(small).state_dict(), tmp_path / "y.pt")
    assert "timm.utils.reparameterize_model" in refused(tmp_path / "y.pt", "timm:repghostnet_050", "num_classes=3").hint


class Nested(nn.ModuleDict):
    """What holds one layer by a dotted name."""

    def __init__(self, path: str) -> None:
        outer, _, name = path.partition(".")
        super().__init__({outer: nn.ModuleDict({name: nn.Conv2d(1, 1, 1)})})


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), ""),
        (Nested("a.conv_kxk"), ""),
        (Nested("a.reparam_conv"), "its blocks are fused already: a.reparam_conv"),
    ],
)
def test_names_of_a_plain_network_give_nothing_away(network: nn.Module, said: str, tmp_path: Path) -> None:
    torch.save(network, tmp_path / "x.pt")
    assert load(tmp_path / "x.pt", allow=[__name__]).fused_already == said


@pytest.mark.parametrize("form", ["pt", "state-dict", "safetensors"])
def test_what_repfuse_wrote_says_so(form: str, tmp_path: Path) -> None:
    checkpoint = load(SAMPLES / "repvgg_digits_state_dict.pth", model="repfuse.samples:DigitsRepVGG")
    assert checkpoint.fused_already == ""
    found = plan(checkpoint.module, checkpoint.example_inputs)
    network = rewrite(checkpoint.module, found)
    attributes = set(vars(network))
    saved = save(checkpoint, network, tmp_path / "out", plan=found, format=form)
    assert set(vars(network)) == attributes  # the network in memory stays as it is
    again = load(saved.path)
    assert again.fused_already.startswith("fused already by repfuse")
    assert ("5 sites" in again.fused_already) == (form != "pt")
    twice = save(again, again.module, tmp_path / "twice", format=form)
    assert load(twice.path).fused_already.startswith("fused already by repfuse")
    plain = save(checkpoint, checkpoint.module, tmp_path / "plain", format=form)
    assert load(plain.path).fused_already == ""


@pytest.mark.parametrize("name", ["repvgg_digits.pt", "repvgg_digits.safetensors"])
def test_converting_twice_says_that_there_is_nothing_to_do(name: str, cli: Cli, tmp_path: Path) -> None:
    out, twice = tmp_path / name, tmp_path / f"twice_{name}"
    model = ("--model", "repfuse.samples:DigitsRepVGG") if name.endswith("safetensors") else ()
    assert cli("convert", SAMPLES / name, out, *model, "--quiet", "--quick").returncode == 0
    done = cli("convert", out, twice, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "nothing-to-fuse"
    assert any(note.startswith("nothing to do: fused already") for note in report["notes"])
    assert not twice.exists()
