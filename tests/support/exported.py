"""An exported program to convert, and its file with one member changed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.agreement import randomised
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

PROGRAM = "models/model.json"


class Block(nn.Module):
    """A RepVGG block."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.three, self.one = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norms[0](self.three(x)) + self.norms[1](self.one(x)) + self.norms[2](x))


class Net(nn.Module):
    """Two blocks, with a keyword input and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block()), nn.Linear(4, 5)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        features = self.blocks(self.stem(x))
        return {"logits": self.head(features.mean((2, 3))) * scale, "maps": [features]}


def net() -> nn.Module:
    return randomised(Net(), dtype=torch.float32)


@cache
def program(network: nn.Module | None = None) -> ExportedProgram:
    """Export the network with a batch up to 64 and sizes from 8 to 1000."""
    axes = {0: Dim("batch", max=64), 2: Dim("height", min=8, max=1000), 3: Dim("width", min=8, max=1000)}
    example = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    shapes = {"x": axes, "scale": None}
    return torch.export.export(network or net(), (example,), {"scale": torch.ones(1)}, dynamic_shapes=shapes)


def saved(made: ExportedProgram, path: Path) -> Path:
    torch.export.save(made, path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with PT2ArchiveReader(str(path)) as reader:
        return {name: reader.read_bytes(name) for name in reader.get_file_names()}


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Write the file again after ``change`` of its members."""
    held = members(path)
    change(held)
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, data in held.items():
            if not name.startswith((".data/", "version", "byteorder", ".format", ".storage")):
                writer.write_bytes(name, data)
    path.write_bytes(buffer.getvalue())
    return path


def with_program(path: Path, change: Callable[[Any], None]) -> Path:
    """Write the file again after ``change`` of its program, parsed."""

    def changed(held: dict[str, bytes]) -> None:
        parsed = json.loads(held[PROGRAM])
        change(parsed)
        held[PROGRAM] = json.dumps(parsed).encode()

    return rewritten(path, changed)
