"""A hook on a module is never lost, and never sees other values than before, without a word."""

from __future__ import annotations

import pytest
import torch
from blocks import Spelled, conv, norm
from support.agreement import error, randomised
from support.small_nets import SITES, Net, X
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from repfuse.fusing import fuse


def nothing(*_args, **_kwargs):
    return None


KINDS = {
    "forward": lambda m: m.register_forward_hook(nothing),
    "forward, always": lambda m: m.register_forward_hook(nothing, always_call=True),
    "forward pre": lambda m: m.register_forward_pre_hook(nothing),
    "forward pre, by name": lambda m: m.register_forward_pre_hook(nothing, with_kwargs=True),
    "backward": lambda m: m.register_full_backward_hook(nothing),
    "backward pre": lambda m: m.register_full_backward_pre_hook(nothing),
    "state dict": lambda m: m.register_state_dict_post_hook(nothing),
    "state dict, old": lambda m: m._register_state_dict_hook(lambda *_: None),
    "state dict pre": lambda m: m.register_state_dict_pre_hook(nothing),
    "load state dict pre": lambda m: m.register_load_state_dict_pre_hook(nothing),
    "load state dict pre, old": lambda m: m._register_load_state_dict_pre_hook(nothing),
    "load state dict post": lambda m: m.register_load_state_dict_post_hook(nothing),
}
LEFT = {  # where the hook is -> which sites are left
    "": SITES,
    "stem": SITES,
    "stem.0": SITES - {"stem.0"},
    "stem.1": SITES - {"stem.0"},
    "block": SITES - {"block.fused"} | {"block.a.0", "block.b.0"},
    "block.a": SITES - {"block.fused"} | {"block.a.0", "block.b.0"},
}


def hooks(module):
    return [
        hook
        for part in module.modules()
        for key, table in vars(part).items()
        if key.endswith("_hooks")
        for hook in table
    ]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        pytest.param(kind, path, marks=pytest.mark.slow if (number + place) % 3 else ())
        for number, kind in enumerate(KINDS)
        for place, path in enumerate(LEFT)
    ],
)
def test_every_kind_of_hook_stays(kind, path):
    model = randomised(Net())
    before = len(hooks(model))
    KINDS[kind](model.get_submodule(path))
    added = len(hooks(model)) - before
    result = fuse(model, (X,))
    assert added and len(hooks(result.module)) - before == added
    assert {site.path for site in result.plan.sites} == LEFT[path]
    assert ("hooks" in {refusal.code for refusal in result.plan.refusals}) == (LEFT[path] != SITES)


def test_a_hook_on_a_container_of_a_part_keeps_its_value():
    """Folded, the convolution in the container would give the normalised value, and the hook would see that."""
    model = randomised(nn.Sequential(nn.Sequential(conv()), norm()))
    model[0].register_forward_hook(nothing)
    result = fuse(model, (X,))
    assert not result.plan.sites and {refusal.code for refusal in result.plan.refusals} == {"hooks"}
    assert fuse(randomised(nn.Sequential(nn.Sequential(conv()), norm())), (X,)).plan.sites


def test_a_root_that_would_become_a_graph_keeps_its_hook():
    model = randomised(Spelled(lambda m, x: torch.sin(m.a(x) + m.b(x)), a=conv(3), b=conv(1)))
    model.register_forward_hook(lambda _module, _args, output: output * 2)
    result = fuse(model, (X,))
    assert not result.plan.sites and error(model, result.module, X) == 0


@pytest.mark.parametrize(
    "wrap", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_the_hooks_by_which_pytorch_computes_weights_are_folded(wrap):
    model = randomised(nn.Sequential(wrap(conv()), norm()))
    result = fuse(model, (X,))
    assert len(result.plan.sites) == 1 and error(model, result.module, X) < 1e-12


def test_pruning_is_a_hook_until_it_is_removed():
    model = randomised(nn.Sequential(conv(), norm()))
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert not fuse(model, (X,)).plan.sites
    prune.remove(model[0], "weight")
    assert fuse(model, (X,)).plan.sites
