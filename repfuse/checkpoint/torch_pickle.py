"""Reading and writing torch.save files. Reading gives inert data, through torch's own restricted unpickler."""

from __future__ import annotations

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from contextlib import contextmanager
from pickle import PicklingError, UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from repfuse.checkpoint.archive import members_of, opened
from repfuse.checkpoint.calls import HARMLESS, VettingError
from repfuse.checkpoint.dictlike import dict_stand_in, is_dictlike
from repfuse.checkpoint.inert import GlobalName, stand_in, tidied
from repfuse.checkpoint.recognise import Container, damaged
from repfuse.checkpoint.soundness import sound
from repfuse.checkpoint.vetting import Scan, scan
from repfuse.errors import RepfuseError
from repfuse.quiet import quietly
from repfuse.wording import described, first_line, listed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Room = Callable[[str | None], int]

LEGACY_PICKLES = 4  # magic number, protocol version, system, and the object itself
PROTOCOL = 2  # the one that torch.save writes and that its restricted unpickler reads


def read(path: Path, container: Container) -> Any:
    """Return what the file holds: tensors and containers as they are, every other object as a Record.

    No code of the file runs. All tensors come to the CPU. Raises RepfuseError where the file is damaged, or where
    it needs what torch's restricted unpickler does not do.
    """
    said = _scan(path, container)
    try:
        with path.open("rb") as file, _stand_ins_for(said.names), quietly():
            tree = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
            return tidied(sound(tree, path.stat().st_size))
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise _unreadable(path, container, said, error) from error


def read_trusted(path: Path) -> Any:
    """Return what the file holds, running whatever code it asks for: only for files that the user trusts."""
    try:
        with path.open("rb") as file, quietly():
            return torch.load(file, map_location="cpu", weights_only=False, mmap=False)
    except Exception as error:  # the file's own code can fail in any way
        raise RepfuseError(
            f"{path} does not load, although it was trusted.",
            described(error),
            "Make the code that it needs importable (install its package, or set PYTHONPATH).",
        ) from error


def write(data: Any, path: Path) -> None:
    """Write ``data`` as torch.save does.

    Raises RepfuseError where it cannot be pickled, OSError where the disk fails.
    """
    try:
        with path.open("wb") as file:
            torch.save(data, file)
    except (PicklingError, AttributeError, TypeError, RecursionError) as error:
        raise RepfuseError(
            "The network cannot be pickled.",
            first_line(error),
            "Write its weights alone: give an output that ends in .safetensors, or --format state-dict.",
        ) from error
    except RuntimeError as error:  # what torch's archive writer makes of an OSError
        raise OSError(first_line(error)) from error


def vet(path: Path, data: bytes) -> None:
    """Raise RepfuseError where ``data``, a torch archive in the file at ``path``, breaks a rule of archives or pickles.

    What it names stays unchecked: that is for torch's restricted unpickler, without stand-ins.
    """
    _scan(path, Container.TORCH_ZIP, data)


def modules_named(path: Path) -> set[str]:
    """Return the Python modules whose classes and functions the file at ``path`` names, one that ``write`` wrote.

    Its protocol calls modules of the standard library as Python 2 did: those are left out.
    """
    opcodes, _ = _instructions(path, Container.TORCH_ZIP, None)
    names = {str(argument).partition(" ")[0] for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
    return names - IMPORT_MAPPING.keys()


def _scan(path: Path, container: Container, data: bytes | None = None) -> Scan:
    try:
        return scan(*_instructions(path, container, data))
    except VettingError as error:
        raise RepfuseError(
            f"{path} asks for more than repfuse lets a file do.",
            f"In its pickle, {error}.",
            "If you trust whoever made the file, --trust loads it all the same.",
        ) from error
    except RepfuseError:
        raise
    except Exception as error:  # likewise
        raise damaged(path, _cause(error)) from error


def _instructions(
    path: Path, container: Container, data: bytes | None
) -> tuple[Iterator[tuple[Any, Any, int | None]], Room]:
    """Return the opcodes, and how many bytes the file has for the storage of each key."""
    if container is not Container.TORCH_ZIP:
        size = path.stat().st_size
        return _legacy_instructions(path), lambda _: size
    members = members_of(path, data)
    root = next(iter(members)).partition("/")[0]
    with opened(path, data) as file, zipfile.ZipFile(file) as archive:
        opcodes = pickletools.genops(archive.read(f"{root}/data.pkl"))
    sizes = {name: member.file_size for name, member in members.items()}
    return opcodes, lambda key: sizes.get(f"{root}/data/{key}", 0)


def _legacy_instructions(path: Path) -> Iterator[tuple[Any, Any, int | None]]:
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            yield from pickletools.genops(file)


@contextmanager
def _stand_ins_for(names: frozenset[GlobalName]) -> Iterator[None]:
    """Let torch's unpickler see a stand-in for each name, and nothing that other code has added for itself."""
    others = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([((dict_stand_in if is_dictlike(name) else stand_in)(name), str(name)) for name in names])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(others)


def _unreadable(path: Path, container: Container, said: Scan, error: Exception) -> RepfuseError:
    foreign = sorted(str(name) for name in said.names - HARMLESS if name.package not in ("torch", "collections"))
    if said.protocol > PROTOCOL:
        why = f"It was written with pickle protocol {said.protocol}; torch's safe loader reads protocol {PROTOCOL}."
    elif foreign and container is Container.TORCH_LEGACY:
        why = "It is in torch's format from before version 1.6, which gives networks together with their source code."
    elif foreign and isinstance(error, UnpicklingError):
        why = f"It does more than restore data. It names: {listed(foreign)}."
    elif said.unknown:
        why = f"Its pickle has the instruction {said.unknown}, which torch's safe loader does not read."
    else:
        return damaged(path, _cause(error))
    return RepfuseError(
        f"{path} cannot be loaded without running code from it.",
        why,
        "Save it again with torch.save(model.state_dict(), ...), or, if you trust whoever made it, use --trust.",
    )


def _cause(error: Exception) -> str:
    """Return what is wrong; torch's restricted unpickler says it after two paragraphs of advice."""
    text = str(error).strip()
    if not text.startswith("Weights only load failed"):
        return first_line(error)
    return re.split(r"\n\n(?:WeightsUnpickler error: )?", text)[-2].splitlines()[0]
