"""With --probe, a module that cannot be traced and is a convolution becomes one; any other stays as it is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from blocks import conv, norm
from support.agreement import error, image, randomised
from torch import nn
from torch.nn import functional as F

import repfuse
from repfuse.errors import RepfuseError
from repfuse.loading import Checkpoint
from repfuse.plans import Plan, Probed
from repfuse.rewriting.opening import open_up

C = 4


class Opaque(nn.Module):
    """A forward that no trace follows, nor torch.export: it decides by values, though never differently."""

    def __init__(self, channels=C):
        super().__init__()
        self.a, self.n, self.b = conv(3, inputs=channels, outputs=channels), norm(channels), conv(1)

    def checked(self, x):
        if not bool(torch.isfinite(x).all()):
            raise ValueError("not finite")
        return x

    def forward(self, x):
        x = self.checked(x)
        return self.n(self.a(x)) + self.b(x)


class Gated(Opaque):
    def forward(self, x):
        return F.relu(super().forward(x))


class Dilated(Opaque):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(C, C, 3, padding=(2, 1), dilation=(2, 1), groups=2)

    def forward(self, x):
        return self.a(self.checked(x))


class Uneven(Opaque):
    def forward(self, x):
        return F.conv2d(F.pad(self.checked(x), (2, 0, 0, 2)), self.a.weight)


class Scaling(Opaque):
    """Cheaper than any convolution of as many channels."""

    def forward(self, x):
        return self.checked(x).flip(1)


class Shuffling(Opaque):
    def forward(self, x):
        return F.conv_transpose2d(self.checked(x), self.a.weight, stride=2)


class Two(Opaque):
    def forward(self, x, y=None):
        return super().forward(x + y)


class Net(nn.Module):
    """The block between layers that merge with it."""

    def __init__(self, block):
        super().__init__()
        self.stem, self.block, self.norm, self.skip, self.head = conv(3), block, norm(), conv(1), conv(1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.block(x, x) if isinstance(self.block, Two) else self.block(x)
        return self.head(F.relu(self.norm(y) + self.skip(x)))


EXAMPLE = (image(1, C, 9, 8, dtype=torch.float32),)


def net(block=Opaque):
    return randomised(Net(block()), dtype=torch.float32)


def checkpoint(module, tmp_path):
    return Checkpoint(module, EXAMPLE, "pt", tmp_path / "in.pt", "", None, "given", ())


def test_an_opaque_convolution_merges_with_what_is_around_it(tmp_path):
    original = net()
    assert repfuse.plan(original, EXAMPLE).sites == ()
    done = repfuse.convert(checkpoint(original, tmp_path), probe=True)
    assert done.passed and done.probe.passed, (done.proof.reason, done.probe.reason)
    assert [one.path for one in done.plan.probed] == ["block"]
    (site,) = done.plan.sites
    assert site.branches == ("conv 3x3 + norm", "conv 1x1")
    assert sum(isinstance(part, nn.Conv2d) for part in done.module.modules()) == 3
    assert error(original, done.module, image(2, C, 5, 6, dtype=torch.float32)) < 1e-5
    assert done.probe.network.error < 1e-12
    (proof,) = done.probe.stand_ins
    assert {one.name for one in proof.reasons} >= {"superposition", "homogeneity", "border", "positions"}
    assert original.block.__class__ is Opaque


def test_without_the_option_nothing_is_probed(tmp_path):
    done = repfuse.convert(checkpoint(net(), tmp_path))
    assert not done.plan.probed and done.probe is None and done.module.block.__class__ is Opaque


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Gated, "sum of the answers"),
        (Scaling, "multiply-accumulates"),
        (Two, "one tensor"),
    ],
)
def test_what_is_none_stays_and_the_refusal_says_what_probing_found(block, reason, tmp_path):
    original = net(block)
    done = repfuse.convert(checkpoint(original, tmp_path), probe=True)
    assert not done.plan.probed
    (refusal,) = [one for one in done.plan.refusals if one.code == "untraceable"]
    assert "probed, it is no convolution" in refusal.reason and reason in refusal.reason


def test_a_transposed_convolution_stays():
    opened = open_up(randomised(nn.Sequential(Shuffling(), conv(3)), dtype=torch.float32), EXAMPLE)
    assert "transposed" in opened.refused["0"]


def test_hooks_and_globs_leave_a_module_alone():
    original = net()
    assert open_up(original, EXAMPLE, ("block",)).probed == ()
    original.block.b.register_forward_hook(lambda *_: None)
    assert open_up(original, EXAMPLE).refused == {"block": "it has hooks"}


def test_the_stand_in_has_as_few_numbers_as_hold_it():
    (found,) = open_up(net(Dilated), EXAMPLE).probed
    assert (found.kernel, found.dilation, found.groups) == ((3, 3), (2, 1), 2)
    assert found.padding == ((2, 2), (1, 1))


def test_uneven_padding_becomes_a_module_of_its_own(tmp_path):
    original = net(Uneven)
    done = repfuse.convert(checkpoint(original, tmp_path), probe=True)
    assert done.passed and done.plan.probed[0].padding == ((0, 2), (2, 0))
    assert error(original, done.module, image(2, C, 5, 6, dtype=torch.float32)) < 1e-5


class Reaching(Net):
    def forward(self, x):
        return super().forward(x) + self.block.a(x)


def test_a_module_that_others_reach_into_stays():
    original = randomised(Reaching(Opaque()), dtype=torch.float32)
    opened = open_up(original, EXAMPLE)
    assert opened.probed == () and "does not run without it" in opened.refused["block"]


class Particular(Opaque):
    """Another map at the example's size, which no probe has."""

    def forward(self, x):
        return super().forward(x) * (1 + 1e-6 * (tuple(x.shape[2:]) == (9, 8)))


def test_what_probing_does_not_see_the_whole_network_does(tmp_path):
    done = repfuse.convert(checkpoint(net(Particular), tmp_path), probe=True)
    assert [one.path for one in done.plan.probed] == ["block"] and done.proof.passed
    assert not done.probe.passed and not done.passed
    assert "block" in done.probe.reason


def test_another_convolution_than_the_plan_says_is_refused():
    original = net()
    (one,) = open_up(original, EXAMPLE).probed
    other = replace(one, kernel=(1, 1), padding=((0, 0), (0, 0)))
    plan = replace(repfuse.plan(original, EXAMPLE), probed=(other,), live=None)
    with pytest.raises(RepfuseError) as refused:
        repfuse.rewrite(original, plan)
    assert "another convolution" in refused.value.why


def test_a_plan_replays_by_probing_again_and_only_when_asked(tmp_path):
    original = net()
    done = repfuse.convert(checkpoint(original, tmp_path), probe=True)
    plan = Plan.from_dict(json.loads(done.plan.to_json()))
    assert plan.probed == done.plan.probed
    again = repfuse.rewrite(original, plan)
    assert error(done.module, again, *EXAMPLE) == 0
    empty = repfuse.rewrite(net(), plan, weights=False)
    empty.load_state_dict(done.module.state_dict())
    assert error(done.module, empty, *EXAMPLE) == 0
    assert repfuse.convert(checkpoint(original, tmp_path), plan=plan, probe=True).passed
    with pytest.raises(RepfuseError, match="which cannot be traced"):
        repfuse.convert(checkpoint(original, tmp_path), plan=plan)
    with pytest.raises(RepfuseError, match="does not fit the module 'block'"):
        repfuse.rewrite(net(Gated), plan)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 3},
        {"groups": 0},
        {"kernel": [3]},
        {"kernel": [2**30, 2**30]},
        {"padding": [[1, 1], [1]]},
        {"stride": [0, 1]},
        {"path": 3},
        {"path": ""},
        {"more": 1},
    ],
)
def test_a_damaged_plan_is_said(change):
    one = Probed("block", C, C, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    data = json.loads(replace(repfuse.plan(conv(3), EXAMPLE), probed=(one,)).to_json())
    assert Plan.from_dict(data).probed == (one,)
    data["probed"][0] |= change
    with pytest.raises(RepfuseError, match="not a plan that repfuse wrote"):
        Plan.from_dict(data)


NETWORK = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    def forward(self, x):
        if bool(torch.isfinite(x).all()):
            return self.a(x) + self.b(x)
        raise ValueError("not finite")
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Block(), nn.BatchNorm2d(4)).eval()
"""


def test_a_state_dict_is_converted_and_read_again(cli, tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    space = {}
    exec(NETWORK, space)
    torch.save(space["build"]().state_dict(), tmp_path / "in.pth")
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    options = ("--model", f"{tmp_path / 'net.py'}:build", "--input", "1x3x8x8")
    done = cli("convert", source, out, *options, "--probe", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [one["path"] for one in report["plan"]["probed"]] == ["2"]
    assert any("module 2 cannot be traced" in note for note in report["notes"])
    fused = repfuse.load(out, model=options[1]).module
    assert isinstance(fused[2], nn.Conv2d)
    assert error(space["build"](), fused, image(2, 3, 8, 7, dtype=torch.float32)) < 1e-5
