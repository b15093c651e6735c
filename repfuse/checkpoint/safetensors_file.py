"""Reading and writing safetensors files: tensors by name, and text beside them; also in shards with their index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repfuse.checkpoint.files import parse_json, read_json
from repfuse.checkpoint.formats import Container, damaged, index_in, reading, recognise
from repfuse.errors import RepfuseError, failing_as
from repfuse.wording import described, first_line, listed


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU and in the order of the file, and the text metadata.

    The tensors are copies: none of them goes on reading the file, which may be overwritten later.
    """
    with reading(path), safe_open(path, framework="pt", device="cpu") as file:
        with path.open("rb") as header:  # of a name that is there twice, each reader takes another one
            parse_json(header.read(int.from_bytes(header.read(8), "little")))
        names = list(file.keys())
        return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {})


def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write ``tensors`` and text ``metadata``. Values and dtypes are kept; strides are not, the format has none.

    A tensor that shares its memory with others is written in full under each name, so that every reader finds
    every name. Raises RepfuseError where the format cannot hold them, OSError where the disk fails.
    """
    what, hint = "These weights cannot be written as safetensors.", "Choose a .pt file as the output."
    try:
        with failing_as(what, hint, of=(KeyError, ValueError, TypeError, AttributeError, RuntimeError)):
            save_file(_apart(tensors), path, {"format": "pt"} | dict(metadata))
    except SafetensorError as error:  # what the library makes of an OSError
        raise OSError(first_line(error)) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if memory in seen else own
        seen.add(memory)
    return apart


LARGEST_INDEX = 100 << 20  # bytes of an index: a million names


def read_shards(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Return the tensors of all shards in the order of the index, and the files they are from, the index first.

    ``path`` is the index, or the folder that holds it. Every name must be in the shard that the index says, and every
    shard a file beside the index. Raises RepfuseError where that is not so.
    """
    index = index_in(path) if path.is_dir() else path
    assert index is not None
    places = weight_map(index)
    shards = {name: index.parent / name for name in dict.fromkeys(places.values())}
    if absent := [name for name, shard in shards.items() if not os.path.isfile(shard)]:  # noqa: PTH113 - of any name
        raise RepfuseError(
            f"{len(absent)} of the {len(shards)} shards of {index} are missing.",
            f"There is no {listed(absent)} beside it.",
            "Download all of them into that folder.",
        )
    held: dict[str, dict[str, Tensor]] = {}
    for name, shard in shards.items():
        if recognise(shard) is not Container.SAFETENSORS:
            raise RepfuseError(
                f"The shard {shard} is not a safetensors file.",
                "repfuse joins shards of this format alone.",
                "Save the weights again: model.save_pretrained(folder, safe_serialization=True).",
            )
        held[name], _ = read(shard)
        if any(held[name].keys() & other.keys() for other in list(held.values())[:-1]):  # links can make one file many
            raise damaged(index, f"{name} holds what another shard holds too")
    if missing := [name for name, shard in places.items() if name not in held[shard]]:
        raise RepfuseError(
            f"The shards do not fit {index}.",
            f"{len(missing)} not in the shard that the index says: {listed(missing)}.",
            "Get the index and all its shards again, from one place.",
        )
    return {name: held[shard][name] for name, shard in places.items()}, (index, *shards.values())


def weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each name. Raises RepfuseError where the file is no index, or leads out of its own folder."""
    try:
        places: Any = read_json(index, LARGEST_INDEX)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(index, f"it is no index of shards ({described(error)})") from error
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise damaged(index, "its weight_map is not a table of names")
    for name in places.values():
        if Path(name).name != name or name == ".." or "\\" in name or "\0" in name:
            what = f"{index} names a shard outside its own folder."
            raise RepfuseError(what, f"It names {name!r}.", "Get the index again from where the weights are from.")
    return places
