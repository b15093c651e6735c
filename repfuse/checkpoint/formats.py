"""The formats that repfuse writes, and which of them a file gets. It knows no torch."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from pathlib import Path


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
