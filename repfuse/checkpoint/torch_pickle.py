"""Reading and writing torch.save files. Reading gives inert data, through torch's own restricted unpickler."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from contextlib import contextmanager
from pickle import PicklingError, UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from repfuse.checkpoint.dictlike import dict_stand_in, is_dictlike
from repfuse.checkpoint.inert import GlobalName, stand_in, tidied
from repfuse.checkpoint.recognise import Container, damaged
from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LEGACY_PICKLES = 4  # magic number, protocol version, system, and the object itself
PROTOCOL = 2  # the one that torch.save writes and that its restricted unpickler reads


class Scan(NamedTuple):
    """What a pickle says of itself before it is loaded: the names that it uses, and its protocol."""

    names: frozenset[GlobalName]
    protocol: int


def read(path: Path, container: Container) -> Any:
    """Return what the file holds: tensors and containers as they are, every other object as a Record.

    No code of the file runs. All tensors come to the CPU. Raises RepfuseError where the file is damaged, or where
    it needs what torch's restricted unpickler does not do.
    """
    scan = _scan(path, container)
    try:
        with path.open("rb") as file, _stand_ins_for(scan.names), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tidied(torch.load(file, map_location="cpu", weights_only=True, mmap=False))
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise _unreadable(path, container, scan, error) from error


def read_trusted(path: Path) -> Any:
    """Return what the file holds, running whatever code it asks for: only for files that the user trusts."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=False, mmap=False)
    except Exception as error:  # the file's own code can fail in any way
        raise RepfuseError(
            f"{path} does not load, although it was trusted.",
            f"{type(error).__name__}: {_first_line(error)}",
            "Make the code that it needs importable (install its package, or set PYTHONPATH).",
        ) from error


def write(data: Any, path: Path) -> None:
    """Write ``data`` as torch.save does.

    Raises RepfuseError where it cannot be pickled, OSError where the disk fails.
    """
    try:
        with path.open("wb") as file:
            torch.save(data, file)
    except (PicklingError, AttributeError, TypeError) as error:
        raise RepfuseError(
            "The network cannot be pickled.",
            _first_line(error),
            "Write its weights alone: give an output that ends in .safetensors, or --format state-dict.",
        ) from error
    except RuntimeError as error:  # what torch's archive writer makes of an OSError
        raise OSError(_first_line(error)) from error


def _scan(path: Path, container: Container) -> Scan:
    names: set[GlobalName] = set()
    protocol = 0
    try:
        for opcode, argument, _ in _instructions(path, container):
            if opcode.name == "PROTO":
                protocol = max(protocol, int(argument))
            elif opcode.name in ("GLOBAL", "INST"):
                names.add(_name(str(argument)))
    except Exception as error:  # likewise
        raise damaged(path, _first_line(error)) from error
    return Scan(frozenset(names), protocol)


def _instructions(path: Path, container: Container) -> Iterator[tuple[Any, Any, int | None]]:
    if container is Container.TORCH_ZIP:
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
            yield from pickletools.genops(archive.read(member))
    else:
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                yield from pickletools.genops(file)


def _name(argument: str) -> GlobalName:
    """Return the name as Python 3 spells it; pickles of protocol 2 may use Python 2's."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return GlobalName(module, name)


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


def _unreadable(path: Path, container: Container, scan: Scan, error: Exception) -> RepfuseError:
    foreign = sorted(str(name) for name in scan.names if name.package not in ("torch", "collections"))
    if scan.protocol > PROTOCOL:
        why = f"It was written with pickle protocol {scan.protocol}; torch's safe loader reads protocol {PROTOCOL}."
    elif foreign and container is Container.TORCH_LEGACY:
        why = "It is in torch's format from before version 1.6, which gives networks together with their source code."
    elif foreign and isinstance(error, UnpicklingError):
        why = f"It does more than restore data. It names: {', '.join(foreign)}."
    else:
        return damaged(path, _first_line(error))
    return RepfuseError(
        f"{path} cannot be loaded without running code from it.",
        why,
        "Save it again with torch.save(model.state_dict(), ...), or, if you trust whoever made it, use --trust.",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
