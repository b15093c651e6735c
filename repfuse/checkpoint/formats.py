"""The formats: what a file is, by its content and never by its name, and what a file becomes that is written.

What is no checkpoint is refused with advice. It knows no torch.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from enum import Enum, StrEnum
from pathlib import Path

from repfuse.errors import RepfuseError, failing_as
from repfuse.wording import first_line

HEAD = 512
HUB = "hf-hub:"  # how the name of what the Hugging Face hub holds begins
CONFIG = "config.json"  # what makes a folder a snapshot of it
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save wrote first before torch 1.6


class Container(Enum):
    """The file formats that repfuse reads."""

    TORCH_ZIP = "torch archive"
    TORCH_LEGACY = "torch file from before torch 1.6"
    SAFETENSORS = "safetensors"
    SHARDED = "sharded safetensors"
    EXPORTED = "exported program"
    TORCHSCRIPT = "TorchScript archive"
    ONNX = "ONNX model"


SAVE_AGAIN = "In PyTorch, save the network with torch.save(model, 'model.pt') or its state_dict(), and give that file."
GIVE_TORCH = "Give the file that torch.save or safetensors wrote."
DOWNLOAD = "The download did not give the file: download it again."
INDEX = "*.safetensors.index.json"
ONNX_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42"
"""What may stand after the version of the format, a small number, in which an ONNX file begins: its next field."""
ZIP_MEMBERS: tuple[tuple[str, Container | str], ...] = (  # a pattern that some member matches, what the file then is
    (r"[^/]+/archive_format|serialized_exported_program\.json", Container.EXPORTED),
    (r"[^/]+/constants\.pkl", Container.TORCHSCRIPT),
    (r"(?s:.*)\.npy", "a NumPy archive (.npz)"),
    (r"(?s:.*)\.weights\.h5", "a Keras archive"),
    (r"[^/]+/data\.pkl", Container.TORCH_ZIP),
)
HEADS = (  # how the file begins, what it then is, what to do
    (b"GGUF", "a GGUF file", SAVE_AGAIN),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, or data)", SAVE_AGAIN),
    (b"\x93NUMPY", "a NumPy array", SAVE_AGAIN),
    (b"\x1f\x8b", "a gzip-compressed file", "Unpack it first (gunzip), and give the file inside."),
    (b"\x89PNG", "a PNG image", GIVE_TORCH),
    (b"\xff\xd8\xff", "a JPEG image", GIVE_TORCH),
    (b"%PDF", "a PDF document", GIVE_TORCH),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the checkpoint itself",
        "Fetch the checkpoint with `git lfs pull`.",
    ),
    (b"<!DOCTYPE", "a web page", DOWNLOAD),
    (b"<html", "a web page", DOWNLOAD),
)


def recognise(path: Path) -> Container:
    """Return the format of the file at ``path``.

    Raises RepfuseError where there is no such file, or where it is not one of the formats that repfuse reads.
    """
    if index_in(path) is not None:
        return Container.SHARDED
    head, size = _head(path)
    if head.startswith(b"PK\x03\x04"):
        return _recognise_zip(path)
    if head[2:].startswith(TORCH_MAGIC):
        return Container.TORCH_LEGACY
    if b'"weight_map"' in head or path.name.endswith(INDEX[1:]):
        return Container.SHARDED
    if head[:1] == b"\x08" and head[2:3] in ONNX_FIELDS:
        return Container.ONNX
    header = int.from_bytes(head[:8], "little")  # how long it is, in a safetensors file
    if head[8:9] != b"{" or header >= 1 << 32:
        raise _not_a_checkpoint(path, head)
    if size < header + 8:
        raise damaged(path, f"its header should have {header:,} bytes, and the whole file has {size:,}")
    return Container.SAFETENSORS


def is_snapshot(path: Path) -> bool:
    """Say whether ``path`` is a folder with a configuration in it."""
    return path.is_dir() and (path / CONFIG).is_file()


def is_hub_name(path: Path | str) -> bool:
    """Say whether ``path`` names a repository of the hub."""
    return str(path).startswith(HUB)


def index_in(folder: Path) -> Path | None:
    """Return the index of the sharded weights that a folder holds, or None; several are as good as none."""
    found = sorted(folder.glob(INDEX)) if folder.is_dir() else []
    return found[0] if len(found) == 1 else None


def _head(path: Path) -> tuple[bytes, int]:
    if path.is_dir():
        raise RepfuseError(
            f"{path} is a folder, not a file.",
            "It holds no index of sharded weights (model.safetensors.index.json).",
            "Give the .pt, .pth or .safetensors file in it.",
        )
    if path.exists() and not path.is_file():
        raise RepfuseError(
            f"{path} is no regular file.",
            "It is a pipe, a socket or a device, which can be read once only, or without end.",
            "Write what comes out of it into a file, and give that.",
        )
    try:
        with path.open("rb") as file:
            head, size = file.read(HEAD), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise RepfuseError(f"{path} does not exist.", "", f"Check the path; you are in {os.getcwd()}.") from None  # noqa: PTH109
    except OSError as error:
        raise RepfuseError(f"{path} cannot be read.", str(error.strerror or error), "") from error
    if not head:
        raise RepfuseError(f"{path} is empty.", "The copy or download was probably interrupted.", "Get the file again.")
    return head, size


def _recognise_zip(path: Path) -> Container:
    with reading(path), zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    for pattern, found in ZIP_MEMBERS:
        if any(re.fullmatch(pattern, member) for member in members):
            if isinstance(found, Container):
                return found
            raise RepfuseError(f"{path} is {found}.", "repfuse does not read this format yet.", SAVE_AGAIN)
    raise RepfuseError(f"{path} is a ZIP archive, but not a checkpoint.", "It has no data.pkl.", SAVE_AGAIN)


DAMAGED, COPY_AGAIN = "is damaged or cut short.", "Copy or download it again, and compare its size with the original's."


def damaged(path: Path, detail: str) -> RepfuseError:
    """Return the error for a file that begins like a checkpoint and then does not read."""
    return RepfuseError(f"{path} {DAMAGED}", detail, COPY_AGAIN)


def reading(path: Path, said: Callable[[BaseException], str] = first_line) -> AbstractContextManager[None]:
    """Say of whatever goes wrong that the file is damaged: its reader, and what is made of it, can fail in any way."""
    return failing_as(f"{path} {DAMAGED}", COPY_AGAIN, why=said)


def _not_a_checkpoint(path: Path, head: bytes) -> RepfuseError:
    for start, name, advice in HEADS:
        if head.lower().startswith(start.lower()):
            return RepfuseError(f"{path} is {name}.", "repfuse does not read this format.", advice)
    looks = (
        (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05", "a plain Python pickle", SAVE_AGAIN),
        (head[257:262] == b"ustar", "a tar archive", "Unpack it; if torch wrote it, save it again with torch."),
        (head[4:8] == b"TFL3", "a TensorFlow Lite model", SAVE_AGAIN),
        (_is_text(head), "text", GIVE_TORCH),
        (True, "no format that repfuse knows", GIVE_TORCH),
    )
    name, advice = next((name, advice) for fits, name, advice in looks if fits)
    return RepfuseError(f"{path} is not a checkpoint that repfuse reads.", f"It looks like {name}.", advice)


def _is_text(head: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        return "\0" not in head.decode("utf-8", errors="strict" if len(head) < HEAD else "ignore")
    return False


class Format(StrEnum):
    """The layouts that repfuse writes."""

    PT = "pt"
    PT2 = "pt2"
    SAFETENSORS = "safetensors"
    STATE_DICT = "state-dict"
    ONNX = "onnx"


TORCH = ("pt", "state-dict")  # what torch.save writes: a network, or its weights
SUFFIXES = {
    **{".safetensors": ("safetensors",), ".pt2": ("pt2",), ".onnx": ("onnx",)},
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), TORCH),
}
GRAPHS = ("pt2", "torchscript")  # inputs that hold a graph, which no source builds anew
WEIGHTS_ALONE = ("state-dict", "safetensors")


def format_for(out: Path, asked: str | None, of_input: str, *, keep_affine: bool = False) -> str:
    """Return the format to write: the one asked for, else what the suffix of ``out`` says, else the input's.

    Raises RepfuseError where it is unknown, needs what is missing, or cannot be made of such an input, or with the
    norms that ``keep_affine`` leaves.
    """
    if asked is not None and asked not in [*Format]:
        raise RepfuseError(f"{asked!r} is not a format.", "", f"Use one of {', '.join(Format)}.")
    form = asked or _by_suffix(out, of_input)
    if of_input == "onnx" and form != "onnx":
        raise RepfuseError(
            f"An ONNX file cannot become a {form} file.",
            "It holds a graph for runtimes: what trained it, and could be trained on, is not in it.",
            "Give OUT the suffix .onnx, or convert the PyTorch checkpoint that it was exported from.",
        )
    if form in WEIGHTS_ALONE and of_input in GRAPHS:
        raise RepfuseError(
            f"A {of_input} file cannot become a file of weights alone ({form}).",
            "It holds its network as a graph: nothing else could build the network that the weights belong to.",
            "Choose --format pt2, onnx or pt.",
        )
    if keep_affine and form == "onnx" != of_input:
        raise RepfuseError(
            "The norms that --keep-affine leaves cannot be written to an ONNX file.",
            "PyTorch's exporter folds them into the convolutions.",
            "Leave --keep-affine out, or write a .pt, .pt2 or .safetensors file.",
        )
    if form == "onnx":
        from repfuse.checkpoint.onnx_file import check_installed

        check_installed()
    return form


def _by_suffix(out: Path, of_input: str) -> str:
    usual = of_input if of_input in [*Format] else "pt2"
    said = SUFFIXES.get(out.suffix.lower(), (usual,))
    if usual in said:
        return usual
    return "state-dict" if said == TORCH and of_input in WEIGHTS_ALONE else said[0]
