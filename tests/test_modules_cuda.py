"""A checkpoint that was saved on a GPU is converted on a machine without one."""

from __future__ import annotations

import pytest
import torch
from blocks import conv, norm
from support.agreement import randomised
from torch import nn

import repfuse


@pytest.fixture
def model():
    return randomised(nn.Sequential(conv(), norm(), nn.ReLU(), conv(1)), dtype=torch.float32)


def test_a_module_whose_storages_say_cuda(model, tmp_path, monkeypatch):
    path = tmp_path / "gpu.pt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
        torch.save(model, path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):  # so that the file does say so
            torch.load(path, weights_only=False)
    loaded = repfuse.load(path, input="1x4x8x8")
    assert {x.device.type for x in loaded.module.parameters()} == {"cpu"}
    result = repfuse.fuse(loaded.module, loaded.example_inputs)
    assert result.plan.sites
    saved = repfuse.save(loaded, result.module, tmp_path / "out.pt")
    again = torch.load(saved.path, weights_only=False)
    assert torch.allclose(again(loaded.example_inputs[0]), model(loaded.example_inputs[0]), atol=1e-5)
