"""Folders of the hub, whose configuration says how the network is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from .assembling import pickled, system, torch_archive, touching
from .attack import Attack
from .shards import WRONG

GOOD: dict[str, Any] = {"architecture": "test_byobnet", "num_classes": 3}


def raw(text: str) -> Attack:
    def make(folder: Path, _canary: Path) -> bytes:
        (folder / "model.safetensors").write_bytes(save({"a": torch.ones(4)}))
        return text.encode("utf-8", "surrogateescape")

    return Attack(make, name="config.json", loads=".")


def config(**changes: Any) -> Attack:
    return raw(json.dumps(GOOD | changes))


def arguments(architecture: str = "test_byobnet", **given: Any) -> Attack:
    return config(architecture=architecture, model_args=given)


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


def large(folder: Path, _canary: Path) -> bytes:
    with (folder / "config.json").open("wb") as file:
        file.write(b"{")
        file.truncate(4 << 30)
    return save({"a": torch.ones(4)})


def evil(folder: Path, canary: Path) -> bytes:
    """Weights that call, beside a good configuration."""
    (folder / "pytorch_model.bin").write_bytes(torch_archive(pickled(system(touching(canary)))))
    return json.dumps(GOOD).encode()


def on_path(folder: Path, canary: Path) -> bytes:
    """A configuration that names code beside it."""
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\ndef net(): pass\n")
    (folder / "model.safetensors").write_bytes(save({"a": torch.ones(4)}))
    return json.dumps({"architecture": f"{folder}/evil.py:net", "auto_map": {"AutoModel": "evil.net"}}).encode()


SNAPSHOTS = {
    **{name: raw(text) for name, text in WRONG.items()},
    "of 4 GB": Attack(large, name="model.safetensors", loads="."),
    "weights that call": Attack(evil, name="config.json", loads=".", executes=True),
    "code beside it": Attack(on_path, name="config.json", loads="."),
    **{
        f"architecture {name!r:.30}": config(architecture=name)
        for name in ("os.system", "hf-hub:evil/net", "local-dir:/x", "../x", "x" * 10_000_000, 7, ["a"], None, "\ud800")
    },
    **{f"{number} classes": config(num_classes=number) for number in (-1, 1.5, 1 << 40, 10**4000, "7", True, [1])},
    **{
        f"input of {size!r:.40}": config(pretrained_cfg={"input_size": size})
        for size in ([3, 1_000_000, 1_000_000], [1 << 40, 8, 8], [3, -1, 8], [3], "x", [[3], 1, 1])
    },
    "a configuration that is text": config(pretrained_cfg="x"),
    "arguments that are text": config(model_args="x"),
    "arguments nested without end": arguments(x=nested(50)),
    "an argument of 2**70": arguments(x=1 << 70),
    "an argument of Infinity": arguments(x=float("inf")),
    "an argument of ten megabytes": arguments(x="x" * 10_000_000),
    "an argument by an odd name": arguments(**{"x.__class__": 1}),
    **{
        f"argument {name}": arguments(**{name: value})
        for name, value in {
            "pretrained": True,
            "checkpoint_path": "/etc/passwd",
            "cache_dir": "/tmp/x",
            "pretrained_cfg_overlay": {},
            "block_types": "os.system",
            "act_layer": "os.system",
            "in_chans": 1_000_000,
        }.items()
    },
    "an image of a million": arguments("vit_tiny_patch16_224", img_size=1_000_000),
}
