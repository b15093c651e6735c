"""From a file to what it holds: one way in for every format."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repfuse.checkpoint import safetensors_file, torch_pickle
from repfuse.checkpoint.contents import RECIPE, Contents, find
from repfuse.checkpoint.recipe import Recipe, read_recipe
from repfuse.checkpoint.recognise import Container, damaged, recognise
from repfuse.errors import RepfuseError
from repfuse.quiet import quietly
from repfuse.wording import described

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch.export import ExportedProgram

    from repfuse.checkpoint.shapes import Shape
    from repfuse.checkpoint.user_code import Named


@dataclass(frozen=True)
class Opened:
    """A file, read: ``format`` as repfuse names it, its digest, its network and recipe, and its text metadata.

    ``program`` is the exported program, where the file is one; ``files`` are those that were read besides. ``inputs``
    are the shapes that the file says its network takes; where it leaves sizes ``open``, other than the batch, they
    are a guess.
    """

    path: Path
    format: str
    digest: str
    contents: Contents
    recipe: Recipe | None
    metadata: dict[str, str] = field(default_factory=dict)
    program: ExportedProgram | None = None
    files: tuple[Path, ...] = ()
    inputs: tuple[Shape, ...] = ()
    open: bool = False


def open_checkpoint(
    path: Path, weights: str = "auto", *, trust: Named | None = None, shapes: Sequence[Shape] | None = None
) -> Opened:
    """Read the file at ``path``, and find the network in it that ``weights`` asks for (see contents.find).

    Without ``trust``, none of the file's code runs and modules stay records; with it, it says what the user named
    besides. ``shapes`` are those of the inputs, where they are known: TorchScript is read by running it.
    """
    container = recognise(path)
    if container is Container.SHARDED:
        tensors, files = safetensors_file.read_shards(path)
        contents = find(OrderedDict(tensors), path, weights)
        return Opened(path, "safetensors", digest_of(*files), contents, None, files=files)
    if container is Container.ONNX:
        return _open_graph(path)
    digest = digest_of(path)
    if container is Container.SAFETENSORS:
        tensors, metadata = safetensors_file.read(path)
        contents, text = find(OrderedDict(tensors), path, weights), metadata.get(RECIPE)
        return Opened(path, "safetensors", digest, contents, _recipe(text, path), metadata)
    if container in (Container.EXPORTED, Container.TORCHSCRIPT):
        from repfuse.checkpoint.exported import archive, torchscript  # torch.export takes a second to import
        from repfuse.checkpoint.exported.program import opened

        if exported := container is Container.EXPORTED:
            program = archive.read(path, trust=bool(trust))
        else:
            program = torchscript.read(path, shapes, trust=bool(trust))
        contents, form = Contents(module=opened(program, path)), "pt2" if exported else "torchscript"
        return Opened(path, form, digest, contents, None, program=program)
    tree: Any = torch_pickle.read_trusted(path, container, trust) if trust else torch_pickle.read(path, container)
    contents = find(tree, path, weights)
    form = "state-dict" if contents.module is None else "pt"
    return Opened(path, form, digest, contents, _recipe(contents.recipe, path))


def _open_graph(path: Path) -> Opened:
    from repfuse.checkpoint import onnx_file

    onnx_file.check_installed()
    from repfuse.checkpoint.onnx_graph.network import network_of  # onnx takes a second to import
    from repfuse.checkpoint.onnx_graph.reading import example_of, files_of, notes_on, read

    try:
        with quietly():
            model = read(path)
            files, (inputs, is_open) = files_of(model, path), example_of(model)
            contents = Contents(module=network_of(model, path), notes=notes_on(model))
    except RepfuseError:
        raise
    except Exception as error:  # its parts may say anything, and of some that is looked at before they run
        raise damaged(path, described(error)) from error
    return Opened(path, "onnx", digest_of(path, *files), contents, None, files=files, inputs=inputs, open=is_open)


def digest_of(*paths: Path) -> str:
    """Return ``sha256:`` and the digest of the file in hexadecimal; of several, the digest of their digests."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(each.digest() for each in digests))
    return f"sha256:{whole.hexdigest()}"


def _recipe(text: Any, path: Path) -> Recipe | None:
    return None if text is None else read_recipe(text, path)
