"""Whole networks of timm: the counts that are known, and timm's own conversion of the same weights. `make peers`."""

from __future__ import annotations

import json
import operator

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import timm_network
from torch import fx, nn

import repfuse

pytestmark = pytest.mark.peers

CONVOLUTIONS = {"repvgg_a0": 22, "repvgg_b1g4": 28, "mobileone_s0": 43}


@pytest.fixture(scope="module", params=CONVOLUTIONS)
def converted(request, tmp_path_factory, cli):
    """A network, its file, the fused file and the report that the command line wrote."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    network = timm_network(name)
    source, fused = folder / "in.safetensors", folder / "fused.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, source)
    done = cli("convert", source, fused, "--model", f"timm:{name}")
    assert done.returncode == 0, done.stderr
    return name, network, fused, json.loads((folder / "fused.safetensors.report.json").read_text())


def backbone_nodes(network: nn.Module) -> list[tuple[fx.Node, nn.Module | None]]:
    """The nodes of the network outside of its attention modules, which have convolutions of their own."""
    graph = fx.symbolic_trace(network).graph
    modules = dict(network.named_modules())
    nodes = [(node, modules.get(str(node.target)) if node.op == "call_module" else None) for node in graph.nodes]
    return [(node, module) for node, module in nodes if ".attn." not in f".{node.target}."]


def test_one_convolution_per_block_is_left_and_nothing_between(converted):
    name, _, fused, _ = converted
    nodes = backbone_nodes(repfuse.load(fused).module)
    assert sum(isinstance(module, nn.Conv2d) for _, module in nodes) == CONVOLUTIONS[name]
    assert not [node for node, module in nodes if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert not [node for node, _ in nodes if node.target in (operator.add, operator.iadd, torch.add, "add", "add_")]
    assert not [node for node, _ in nodes if node.target is nn.functional.batch_norm]


def test_proof_and_drift_are_in_the_report(converted):
    *_, report = converted
    assert report["proof"]["passed"] and report["proof"]["error"] <= 1e-12
    assert report["drift"]["passed"]
    assert not report["plan"]["refusals"]


def test_timm_loads_it_strictly_into_its_own_converted_network(converted):
    from timm.utils.model import reparameterize_model

    _, network, fused, _ = converted
    theirs = reparameterize_model(network)
    own = {key: value.clone() for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(load_file(fused), strict=True)
    for key, value in theirs.state_dict().items():
        scale = own[key].abs().max()
        assert (value - own[key]).abs().max() <= 1e-5 * scale, key


def test_timm_s_own_conversion_agrees(converted):
    from timm.utils.model import reparameterize_model

    _, network, fused, _ = converted
    x = torch.randn(2, 3, 129, 97, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network.double()(x.double())
        ours = repfuse.load(fused).module(x)
        theirs = reparameterize_model(network.float())(x)
    scale = expected.abs().max()
    assert (ours - expected).abs().max() <= 1e-4 * scale
    # Both are rounded float32 networks; ours is folded in float64 and may not be the worse one beyond chance.
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm()
