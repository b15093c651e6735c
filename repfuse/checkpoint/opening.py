"""From a file to what it holds: one way in for every format."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repfuse.checkpoint import safetensors_file, torch_pickle
from repfuse.checkpoint.contents import RECIPE, Contents, find
from repfuse.checkpoint.recipe import Recipe, read_recipe
from repfuse.checkpoint.recognise import Container, recognise

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Opened:
    """A file, read: ``format`` as repfuse names it, its digest, its network and recipe, and its text metadata."""

    path: Path
    format: str
    digest: str
    contents: Contents
    recipe: Recipe | None
    metadata: dict[str, str] = field(default_factory=dict)


def open_checkpoint(path: Path, weights: str = "auto", *, trust: bool = False) -> Opened:
    """Read the file at ``path``, and find the network in it that ``weights`` asks for (see contents.find).

    Without ``trust``, none of the file's code runs and modules stay records.
    """
    container = recognise(path)
    digest = digest_of(path)
    if container is Container.SAFETENSORS:
        tensors, metadata = safetensors_file.read(path)
        contents, text = find(OrderedDict(tensors), path, weights), metadata.get(RECIPE)
        return Opened(path, "safetensors", digest, contents, _recipe(text, path), metadata)
    tree: Any = torch_pickle.read_trusted(path) if trust else torch_pickle.read(path, container)
    contents = find(tree, path, weights)
    form = "state-dict" if contents.module is None else "module"
    return Opened(path, form, digest, contents, _recipe(contents.recipe, path))


def digest_of(path: Path) -> str:
    """Return ``sha256:`` and the digest of the file in hexadecimal."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _recipe(text: Any, path: Path) -> Recipe | None:
    return None if text is None else read_recipe(text, path)
