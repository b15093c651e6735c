"""Reading and writing .pt2 files. Nothing of a file runs: its members are checked before torch loads any of them.

torch's own loader runs a file in five ways: a member of plain pickle (custom objects, and whatever its safe unpickler
refuses), compiled code (AOTInductor), guards and names (which become Python source), symbolic sizes (``sympify``), and
operators and types that it looks up by name. The bytes that are checked are the very bytes that are loaded.
"""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from repfuse.checkpoint.exported.inspection import Unsafe, check_names, check_program
from repfuse.checkpoint.recognise import damaged
from repfuse.checkpoint.torch_pickle import check_unpacked, read_plain
from repfuse.errors import RepfuseError
from repfuse.networks import quantised
from repfuse.quiet import quietly
from repfuse.wording import first_line

PROGRAM = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
CONFIGS = (f"{WEIGHTS}model_weights_config.json", f"{CONSTANTS}model_constants_config.json")
MEMBERS = re.compile(  # every member that a program without code of its own has
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)|extra/.*"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment"
)
INT8 = b'"torch.ops.quantized'  # an operator of a network that was converted to int8
KNOWN_DEVICES = ("cuda", "xpu", "mps")
SAVE_AGAIN = "Save it again with torch.export.save, or, if you trust whoever made it, use --trust."


def read(path: Path, *, trust: bool) -> torch.export.ExportedProgram:
    """Return the program in the file at ``path``, its tensors on the device that it names.

    Raises RepfuseError where the file is damaged, where the network is one of int8, or, without ``trust``, where it
    holds more than a graph of operators and plain tensors.
    """
    data = path.read_bytes()
    if INT8 in data:
        raise quantised(str(path), aware=False)
    if not trust:
        check(path, data)
    try:
        with quietly():
            return torch.export.load(io.BytesIO(data))
    except Exception as error:  # a damaged file can make torch's reader fail in any way, and a trusted one runs code
        raise damaged(path, first_line(error)) from error


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write ``program`` as torch.export.save does. Raises RepfuseError where it cannot be saved, OSError for a disk."""
    try:
        with path.open("wb") as file, quietly():
            torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:  # the serialiser raises what it likes
        raise RepfuseError(
            "This program cannot be written as .pt2.",
            first_line(error),
            "Choose a .pt or .safetensors file.",
        ) from error


def check(path: Path, data: bytes) -> None:
    """Raise RepfuseError where ``data``, the file at ``path``, is more than a graph of operators and plain tensors."""
    try:
        check_unpacked(io.BytesIO(data), len(data))  # torch's reader unpacks some members as soon as it is made
        with quietly():
            reader = torch._C.PyTorchFileReader(io.BytesIO(data))  # another might see other members in it
            members = set(reader.get_all_records())
            _check_members(path, members)
            program = json.loads(reader.get_record(PROGRAM))
            configs = [json.loads(reader.get_record(name))["config"] for name in CONFIGS]
            inputs = reader.get_record(INPUTS)
        check_program(program)
        for folder, config in zip((WEIGHTS, CONSTANTS), configs, strict=True):
            check_names(config)
            _check_payload(reader, folder, config, len(data))
            _check_devices(path, config)
        _check_inputs(inputs)
    except RepfuseError:
        raise
    except Unsafe as error:
        raise _refused(path, str(error)) from error
    except Exception as error:  # a damaged file can make torch's reader fail in any way
        raise damaged(path, first_line(error)) from error


def _check_members(path: Path, members: set[str]) -> None:
    if "models/model.json" not in members:
        what = "it was compiled by AOTInductor" if any("aotinductor" in name for name in members) else ""
        older = "it has no models/model.json: it may be from torch 2.7 or before"
        raise _refused(path, what or older)
    if strange := sorted(name for name in members if not MEMBERS.fullmatch(name)):
        raise _refused(path, f"it has the member {strange[0]!r}, which may be code or a pickle")


def _check_payload(reader: Any, folder: str, config: dict[str, Any], size: int) -> None:
    """Raise Unsafe where a tensor is a pickle, or where it would be larger than the file, which has ``size`` bytes."""
    for name, payload in config.items():
        member, form = payload["path_name"], payload["tensor_meta"]
        if payload["use_pickle"] is not False or not MEMBERS.fullmatch(folder + member) or form is None:
            raise Unsafe(f"its tensor {name!r} is a pickle or an object of a class of its own")
        held = reader.get_record_size(folder + member)
        if math.prod(dimension["as_int"] for dimension in form["sizes"]) > (size if held else 0):
            raise Unsafe(f"its tensor {name!r} would be larger than the file")


def _check_devices(path: Path, config: dict[str, Any]) -> None:
    for payload in config.values():
        name = payload["tensor_meta"]["device"]["type"]
        if name != "cpu" and not (name in KNOWN_DEVICES and getattr(torch, name).is_available()):
            raise RepfuseError(
                f"{path} was exported for {str(name)[:20]!r}, which this machine does not have.",
                "An exported program names its device at every place.",
                "Move it first, where it runs: torch.export.passes.move_to_device_pass(program, 'cpu').",
            )


def _check_inputs(data: bytes) -> None:
    """Raise Unsafe where torch would fall back from its safe unpickler to the one that runs code."""
    try:
        if data:
            check_unpacked(io.BytesIO(data), len(data))
            read_plain(io.BytesIO(data), len(data))
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise Unsafe("its sample inputs are more than tensors and plain containers") from error


def _refused(path: Path, why: str) -> RepfuseError:
    return RepfuseError(f"{path} cannot be loaded without running code from it.", f"{why}.", SAVE_AGAIN)
