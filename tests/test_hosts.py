"""Libraries that fold what is left when they run or export a network go on doing so with what repfuse made of it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from support.agreement import error, randomised
from support.networks import timm_network
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import repfuse

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """The layer of the YOLO family, which says its own class over a method of torch."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.type = "layers.Layer"  # type: ignore[assignment, method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class Host(nn.Module):
    """Folds as its library does: by the name ``bn``, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(3, 4), Layer(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def fuse(self) -> Host:
        for layer in self.layers:
            conv, bn = layer.conv, layer.bn
            weights = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *weights)
            del layer.bn
            layer.forward = MethodType(type(layer).forward_fuse, layer)
        return self


class Older(Host):
    """As its older versions do, by products of matrices."""

    def fuse(self) -> Host:
        for layer in self.layers:
            conv, bn = layer.conv, layer.bn
            scale = torch.diag(bn.weight.div(torch.sqrt(bn.eps + bn.running_var)))
            shift = bn.bias - bn.weight.mul(bn.running_mean).div(torch.sqrt(bn.running_var + bn.eps))
            weight = torch.mm(scale, conv.weight.flatten(1)).view_as(conv.weight)
            conv.bias = nn.Parameter(torch.mm(scale, conv.bias[:, None])[:, 0] + shift)
            conv.weight = nn.Parameter(weight)
            del layer.bn
            layer.forward = layer.forward_fuse
        return self


@pytest.mark.parametrize("host", [Host, Older])
@torch.no_grad()
def test_a_host_folds_what_was_folded_and_nothing_changes(host: type[Host], tmp_path: Path) -> None:
    network = randomised(host(), dtype=torch.float32)
    torch.save({"model": network, "ema": None}, tmp_path / "in.pt")
    checkpoint = repfuse.load(tmp_path / "in.pt", allow=[__name__], input="2x3x16x16")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    assert len(result.plan.sites) == 2
    assert result.module.state_dict().keys() == {
        f"layers.{i}.conv.{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    repfuse.save(checkpoint, result.module, tmp_path / "out.pt", plan=result.plan)
    fused = repfuse.load(tmp_path / "out.pt", allow=[__name__], input="2x3x16x16").module
    before = fused(X)
    assert torch.allclose(before, network(X), atol=1e-5)
    after = copy.deepcopy(fused).fuse()
    assert not any("bn" in layer._modules for layer in after.layers)
    assert torch.equal(before, after(X))


class Unit(nn.Sequential):
    """The layer of LeViT and its heirs: their library puts what its ``fuse`` makes in its place."""

    def __init__(self, before: int = 4, after: int = 4, kernel: int = 3, **options: Any) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(before, after, kernel, bias=False, **options))
        self.add_module("bn", nn.BatchNorm2d(after))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        c, bn = self._modules.values()
        scale = bn.weight / (bn.running_var + bn.eps) ** 0.5
        made = nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, groups=c.groups)
        made = made.to(scale.dtype)
        made.weight.copy_(c.weight * scale[:, None, None, None])
        made.bias.copy_(bn.bias + ((0 if c.bias is None else c.bias) - bn.running_mean) * scale)
        return made


class Unsaid(Unit):
    fuse = None  # type: ignore[assignment]


class InPlace(Unit):
    def fuse(self) -> nn.Module:
        self.c, self.bn = nn.Conv2d(4, 4, 3), nn.Identity()
        return self


class Followed(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("act", nn.ReLU())


class Widened(nn.Sequential):
    """Becomes a convolution behind a channel of ones."""

    fuse = Unit.fuse

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 32, 1), Unit(32, padding=1))


class Calling(nn.Module):
    """Calls a unit that none of its methods but ``forward`` names."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(Unit(3), nn.ReLU()), unit

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.head(self.stem(x)))


class Reading(Calling):
    def classifier(self) -> nn.Module:
        return self.head.c


class ReadingEach(Calling):
    def classifier(self) -> nn.Module:
        return next(iter([each.c for each in (self.head,)]))


class Having(Calling):
    @property
    def width(self) -> int:
        return self.head.c.out_channels


class Keeping(Calling):
    @functools.cached_property
    def width(self) -> int:
        return self.head.c.out_channels


class Fusing(Calling):
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        return self.head.fuse()


class Using(Calling):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self.head, "c").weight.shape[0]  # noqa: B009 - which no code names


X64 = X.double()


def merged(network: nn.Module, sites: int = 2, **settings: Any) -> nn.Module:
    """Return the fused form of a network."""
    result = repfuse.fuse(network, (X64,), **settings)
    assert len(result.plan.sites) == sites
    assert error(network, result.module, X64) < 1e-12
    return result.module


def reparameterized(network: nn.Module) -> nn.Module:
    """Return what timm's function makes of a network: each child that can be fused is, then those in it."""
    network = copy.deepcopy(network)
    for parent in network.modules():
        for name, child in parent.named_children():
            setattr(parent, name, child.fuse() if getattr(child, "fuse", None) else child)
    return network


@torch.no_grad()
def test_a_layer_takes_the_place_where_its_authors_put_it() -> None:
    network = randomised(Calling(Unit(groups=2, stride=2, padding=1)))
    fused, theirs = merged(network), reparameterized(network)
    assert type(fused.head) is type(fused.stem[0]) is nn.Conv2d
    assert (fused.head.groups, fused.head.stride, fused.head.padding) == (2, (2, 2), (1, 1))
    assert list(fused.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(fused.state_dict(), strict=True)
    assert error(network, theirs, X64) < 1e-12


@pytest.mark.parametrize("kind", [Reading, ReadingEach, Having, Keeping, Fusing, Using])
@torch.no_grad()
def test_a_layer_stays_where_others_look_for_it(kind: type[Calling]) -> None:
    network = randomised(kind(Unit()))
    fused = merged(network)
    assert type(fused.head) is Unit and type(fused.stem[0]) is nn.Conv2d
    again = reparameterized(fused)  # of which ``Using`` would find no ``c``
    assert torch.allclose(Calling.forward(again, X64), Calling.forward(fused, X64), rtol=1e-12)


@pytest.mark.parametrize("unit", [Unsaid(), InPlace(), Followed(), Unit(kernel=2, padding="same")])
@torch.no_grad()
def test_a_layer_stays_in_what_its_authors_keep(unit: Unit) -> None:
    fused = merged(randomised(Calling(unit)))
    assert type(fused.head) is type(unit) and fused.head.state_dict().keys() == {"c.weight", "c.bias"}


def test_a_layer_with_another_before_it_stays_in_what_calls_both() -> None:
    fused = merged(randomised(Calling(Widened())))
    assert [type(part) for part in (fused.head, *fused.head)] == [Widened, nn.Identity, Unit]


def test_a_unit_with_a_hook_stays_and_so_does_the_hook() -> None:
    network, seen = randomised(Calling(Unit())), list[Tensor]()
    network.head.register_forward_hook(lambda _module, _given, made: seen.append(made))
    fused = merged(network)
    assert type(fused.head) is Unit and torch.allclose(seen[-1], seen[-2], rtol=1e-12)


def test_the_outermost_unit_and_one_that_keeps_a_norm_stay() -> None:
    unit = Unit()
    unit.add_module("more", nn.BatchNorm2d(4))
    assert type(merged(randomised(Unit(3)), 1)) is Unit
    assert type(merged(randomised(Calling(unit)), 1, keep_affine=True).head) is Unit


class Twice(Calling):
    def __init__(self, unit: nn.Module) -> None:
        super().__init__(unit)
        self.more = nn.ModuleList([unit])

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.more[0](super().forward(x)))


class ReadingElsewhere(Twice):
    def classifier(self) -> nn.Module:
        return self.more[0].c


def test_a_layer_that_stands_in_two_places_is_one_in_both() -> None:
    fused = merged(randomised(Twice(Unit())))
    assert type(fused.head) is nn.Conv2d and fused.more[0] is fused.head
    read = merged(randomised(ReadingElsewhere(Unit())))
    assert type(read.head) is Unit and read.classifier() is read.head.c


class ReadingByNumber(nn.Sequential):
    def classifier(self) -> nn.Module:
        return self[0].c


def test_a_layer_stays_where_it_is_looked_for_by_number() -> None:
    outermost = merged(randomised(ReadingByNumber(Unit(3), nn.ReLU(), Unit())))
    *_, inner = merged(randomised(nn.Sequential(Unit(3), nn.ReLU(), ReadingByNumber(Unit()))))
    for fused in (outermost, inner):
        assert fused.classifier() is fused[0].c


def test_a_layer_stays_where_a_module_in_between_looks_for_it() -> None:
    (fused,) = merged(randomised(nn.Sequential(Reading(Unit()))))
    assert type(fused.head) is Unit and fused.classifier() is fused.head.c


class Plain(nn.Module):
    """Folds nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def test_elsewhere_nothing_is_left_of_a_folded_normalisation() -> None:
    result = repfuse.fuse(randomised(Plain(), dtype=torch.float32), (X,))
    assert type(result.module.bn) is nn.Identity and not dict(result.module.bn.named_buffers())


@pytest.mark.peers
@pytest.mark.parametrize("name", ["repvit_m1", "tiny_vit_5m_224", "shvit_s1", "efficientvit_m0"])
@torch.no_grad()
def test_networks_of_timm_fold_there_and_have_its_names(name: str) -> None:
    from timm.utils.model import reparameterize_model

    network = timm_network(name)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    fused = repfuse.fuse(network, (x,)).module
    assert torch.equal(reparameterize_model(fused)(x), fused(x))
    names, theirs = (set(each.state_dict()) for each in (fused, reparameterize_model(network)))
    if name == "shvit_s1":  # whose ``get_classifier`` reads on in its head
        assert fused.get_classifier() is fused.head.l and names - theirs == {"head.l.weight", "head.l.bias"}
    elif name != "efficientvit_m0":  # of which more is merged than timm does
        assert names == theirs


@pytest.mark.peers
@pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolov10n", "yolo11n"])
def test_networks_of_ultralytics_run_and_fold_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    ultralytics: Any = pytest.importorskip("ultralytics")
    made = ultralytics.YOLO(f"{name}.yaml")
    for norm in (part for part in made.model.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.8, 1.2)
    made.save(tmp_path / "in.pt")
    checkpoint = repfuse.load(tmp_path / "in.pt", allow=["ultralytics"], input="1x3x64x64")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    assert result.plan.sites
    repfuse.save(checkpoint, result.module, tmp_path / "out.pt", plan=result.plan)
    given = torch.rand(1, 3, 64, 64)
    before, after = (ultralytics.YOLO(tmp_path / file).model.eval() for file in ("in.pt", "out.pt"))
    expected, found = before(given)[0], after.fuse(verbose=False)(given)[0]
    assert after.is_fused()
    assert torch.allclose(expected, found, rtol=1e-3, atol=1e-2 * float(expected.abs().max()))
