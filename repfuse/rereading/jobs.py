"""How a file that was written is read: with the options that its user would need to give, and no others."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from repfuse.checkpoint import torch_pickle
from repfuse.checkpoint.recipe import check_buildable
from repfuse.checkpoint.source import ModelSource, as_texts
from repfuse.errors import RepfuseError
from repfuse.loading import Checkpoint
from repfuse.networks import device_of
from repfuse.rereading.messages import Job

PACKAGE = "repfuse"


def network_job(checkpoint: Checkpoint, path: Path, *, trust: bool) -> Job:
    """Return the job for a file that holds its network as modules, in what was around it in ``checkpoint``.

    It may need ``trust`` where the checkpoint did not: what it holds was pickled just now from objects that this
    process has, and reading it runs the code of their classes, which ran here. For the same reason torch.load may read
    it by itself, which it is to do without repfuse, unless the network's classes are repfuse's own.
    """
    named = torch_pickle.modules_named(path)
    keys = checkpoint.around.keys
    return Job(
        "network",
        str(path.resolve()),
        torch.get_num_threads(),
        loading=_loading(checkpoint, keys) | {"trust": trust},
        keys=keys,
        alone=not any(_package(name) == PACKAGE for name in named),
        module=True,
        needs=tuple(named),
    )


def weights_job(checkpoint: Checkpoint, path: Path, keys: tuple[str, ...]) -> Job:
    """Return the job for a file of weights that says how its network is built.

    Where that means running code, the user has to say it again.
    """
    source = checkpoint.source
    assert source is not None
    said = {} if _builds(source, path, checkpoint.allow) else {"model": source.spec, "model_args": as_texts(source)}
    needs = (source.parts[0],) if source.kind == "import" else ()
    loading = _loading(checkpoint, keys) | said
    return Job("network", str(path.resolve()), torch.get_num_threads(), loading=loading, keys=keys, needs=needs)


def bare_job(path: Path, keys: tuple[str, ...]) -> Job:
    """Return the job for a file of weights whose network nobody could build from it."""
    return Job("weights", str(path.resolve()), torch.get_num_threads(), keys=keys)


def _loading(checkpoint: Checkpoint, keys: tuple[str, ...]) -> dict[str, Any]:
    weights = ".".join(keys) or "auto"
    device = str(device_of(checkpoint.module))
    return {"weights": weights, "allow": list(checkpoint.allow), "device": device}


def _builds(source: ModelSource, path: Path, allow: Collection[str]) -> bool:
    """Whether a file may name what builds its network without being trusted."""
    try:
        check_buildable(source, path, allow)
    except RepfuseError:
        return False
    return True


def _package(name: str) -> str:
    return name.partition(".")[0]
