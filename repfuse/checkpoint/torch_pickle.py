"""Reading and writing torch.save files. Reading gives inert data, through torch's own restricted unpickler."""

from __future__ import annotations

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from repfuse.checkpoint.allow import GlobalName, advice, names_refused
from repfuse.checkpoint.formats import Container, damaged, reading
from repfuse.checkpoint.records import PlayedDict, Record, stand_in, tidied, walk
from repfuse.checkpoint.user_code import Named, playing_main
from repfuse.errors import RepfuseError, failing_as, quietly
from repfuse.networks import quantised
from repfuse.wording import described, first_line, listed

LEGACY_PICKLES = 4  # magic number, protocol version, system, and the object itself
PROTOCOL = 2  # the one that torch.save writes and that its restricted unpickler reads
CALLED = {  # what torch's restricted unpickler calls, beside torch's own
    *(GlobalName("_codecs", "encode"), GlobalName("builtins", "bytearray")),
    *(GlobalName("builtins", "set"), GlobalName("builtins", "complex")),
}
NAME = 1000  # characters of the name of a class
FREE_BYTES = 1 << 28
BYTES_OF_BYTE = 8  # what a byte of the file may stand for: repeated numbers take the room of one
DICTIONARIES = {"AttributeDict", "ConfigDict", "CfgNode", "EasyDict", "Munch", "defaultdict", "addict.Dict"}
"""Classes that are known to be dictionaries: configurations of Lightning, MMEngine, ..."""


QUANTISED = GlobalName("torch._utils", "_rebuild_qtensor")
DYNAMIC = "torch.ao.nn.quantized.dynamic"  # which leaves all but some linear layers as they are
AWARE = re.compile(r"\.fake_quant_enabled$|(^|\.)activation_post_process(_\d+)?\.")  # in names of a state dict


class PickleSummary(NamedTuple):
    """What a pickle says of itself: the names that it uses, its protocol, and whether it was prepared for int8."""

    names: frozenset[GlobalName] = frozenset()
    protocol: int = 0
    aware: bool = False

    def check_floating(self, path: Path) -> None:
        """Raise RepfuseError where the network is one of int8, or on its way there."""
        dynamic = any(name.module.startswith(DYNAMIC) for name in self.names)
        if self.aware or (QUANTISED in self.names and not dynamic):
            raise quantised(str(path), aware=self.aware)


def read(path: Path, container: Container, *, mapped: bool = False) -> Any:
    """Return what the file holds: tensors and containers as they are, every other object as a Record.

    No code of the file runs. All tensors come to the CPU, or stay in the file where that is to be ``mapped``. Raises
    RepfuseError where the file is damaged, or where it needs what torch's restricted unpickler does not do.
    """
    said = _summary(path, container)
    said.check_floating(path)
    try:
        with path.open("rb") as file, _stand_ins_for(said.names):
            return tidied(read_plain(path if mapped else file, path.stat().st_size))
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise _unreadable(path, container, said, error) from error


def read_plain(file: IO[bytes] | Path, size: int) -> Any:
    """Return what torch's restricted unpickler makes of a file of ``size`` bytes; it raises what it likes. The tensors
    stay in a file that is given by its path.

    Raises ValueError where a tensor is of a kind of its own, or where they are larger than such a file can mean.
    """
    with quietly(), torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        tree = torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))
    room = room_for(size)
    for tensor in walk(tree):
        if isinstance(tensor, Tensor):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested:
                raise ValueError("it holds a tensor of a kind of its own")
            room -= tensor.numel() * tensor.element_size()
    if room < 0:
        raise ValueError("its tensors are larger than a file of this size can mean")
    return tree


def room_for(size: int) -> int:
    """Return how many bytes of memory the tensors in a file of ``size`` bytes may take."""
    return max(FREE_BYTES, BYTES_OF_BYTE * size)


def check_unpacked(file: Path | IO[bytes], most: int) -> None:
    """Raise ValueError where the members of an archive would be larger than ``most`` bytes."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > most:
        raise ValueError(f"its members would unpack to {unpacked:,} bytes, which is out of proportion")


def read_trusted(path: Path, container: Container, named: Named) -> Any:
    """Return what the file holds, running whatever code it asks for: only for files that the user trusts."""
    said = PickleSummary()
    with suppress(RepfuseError):  # torch may make more of a file than can be read without it
        said = _summary(path, container)
    said.check_floating(path)
    try:
        with path.open("rb") as file, quietly(), named.importable():
            return torch.load(file, map_location="cpu", weights_only=False, mmap=False)
    except Exception as error:  # the file's own code can fail in any way
        hint = advice([need for need in names_refused(said.names, named) if need.allow or need.install])
        hint = hint or "Install what it needs in the versions that it was saved with."
        raise RepfuseError(f"{path} does not load, although it was trusted.", described(error), hint) from error


def write(data: Any, path: Path) -> None:
    """Write ``data`` as torch.save does.

    Raises RepfuseError where it cannot be pickled, OSError where the disk fails.
    """
    hint = "Write its weights alone: give an output that ends in .safetensors, or --format state-dict."
    kinds = (PicklingError, AttributeError, TypeError, RecursionError)
    pickling = failing_as("The network cannot be pickled.", hint, of=kinds, why=first_line)
    try:
        with path.open("wb") as file, playing_main(), pickling:
            torch.save(data, file)
    except RuntimeError as error:  # what torch's archive writer makes of an OSError
        raise OSError(first_line(error)) from error


def modules_named(path: Path) -> set[str]:
    """Return the modules whose classes and functions the file at ``path`` names, one that ``write`` wrote."""
    return {name.module for name in _summary(path, Container.TORCH_ZIP).names}


def _summary(path: Path, container: Container) -> PickleSummary:
    names, protocol, aware = set(), 0, False
    with reading(path):
        for opcode, argument, _ in _instructions(path, container):
            if opcode.name == "PROTO":
                protocol = max(protocol, int(argument))
            elif opcode.name in ("GLOBAL", "INST"):
                names.add(_name(str(argument)))
            elif opcode.name in ("BINUNICODE", "SHORT_BINUNICODE"):
                aware = aware or AWARE.search(argument) is not None
    return PickleSummary(frozenset(names), protocol, aware)


def _name(argument: str) -> GlobalName:
    """Return the name as Python 3 spells it; pickles of protocol 2 may use Python 2's."""
    if len(argument) > NAME:  # torch would search a message about it without end
        raise ValueError(f"it names something with {len(argument):,} characters")
    module, _, name = argument.partition(" ")
    return GlobalName(*NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


def _instructions(path: Path, container: Container) -> Iterator[tuple[Any, Any, int | None]]:
    if container is not Container.TORCH_ZIP:
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                yield from pickletools.genops(file)
        return
    check_unpacked(path, path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        (member,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
        yield from pickletools.genops(archive.read(member))


@contextmanager
def _stand_ins_for(names: frozenset[GlobalName]) -> Iterator[None]:
    """Let torch's unpickler see a stand-in for each name, and nothing that other code has added for itself."""
    others = get_safe_globals()
    clear_safe_globals()
    for name in names:
        played = DICTIONARIES & {name.name, f"{name.package}.{name.name}"}
        add_safe_globals([(stand_in(name, PlayedDict if played else Record), str(name))])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(others)


def _unreadable(path: Path, container: Container, said: PickleSummary, error: Exception) -> RepfuseError:
    foreign = sorted(str(name) for name in said.names - CALLED if name.package not in ("torch", "collections"))
    cause = _cause(error)
    if said.protocol > PROTOCOL:
        why = f"It was written with pickle protocol {said.protocol}; torch's safe loader reads protocol {PROTOCOL}."
    elif foreign and container is Container.TORCH_LEGACY:
        why = "It is in torch's format from before version 1.6, which gives networks together with their source code."
    elif foreign and isinstance(error, UnpicklingError):
        why = f"It does more than restore data. It names: {listed(foreign)}."
    elif "Unsupported operand" in cause:
        why = f"Its pickle has an instruction that torch's safe loader does not read ({cause})."
    else:
        return damaged(path, cause)
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
