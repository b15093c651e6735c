"""The shapes of inputs as text, as --input takes them. It knows no torch: a mistake in one is said at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from collections.abc import Iterable

FORM = (
    "Write it as 1x3x224x224, with a dtype after a colon where it matters (1x3x224x224:float16), several with commas."
)
DTYPES = {
    *("float64", "double", "float32", "float", "float16", "half", "bfloat16", "complex32", "complex64", "complex128"),
    *("int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "bool"),
}


@dataclass(frozen=True)
class Shape:
    """One input: its sizes with the batch first, and the name of its dtype where it is given."""

    sizes: tuple[int, ...]
    dtype: str | None = None

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes)) + (f":{self.dtype}" if self.dtype else "")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Return the inputs that ``text`` describes, such as ``1x3x224x224`` or ``1x3x64x64:float16,1x10:int64``."""
    shapes = tuple(_parse(part.strip()) for part in text.split(","))
    if len(shapes) > 1 and all(len(shape.sizes) == 1 for shape in shapes):
        raise RepfuseError(f"{text!r} is not an input shape.", "A comma separates inputs, x the sizes of one.", FORM)
    return shapes


def _parse(part: str) -> Shape:
    match = re.fullmatch(r"([1-9]\d{0,17}(?:x[1-9]\d{0,17})*)(?::(?:torch\.)?(\w+))?", part)
    if not match:
        raise RepfuseError(f"{part!r} is not an input shape.", "Sizes are positive whole numbers.", FORM)
    if match[2] and match[2] not in DTYPES:
        raise RepfuseError(f"{match[2]!r} is not a dtype of torch.", "", "Use float32, float16, bfloat16, int64, ...")
    return Shape(tuple(int(size) for size in match[1].split("x")), match[2])


def render(shapes: Iterable[Shape]) -> str:
    """Return the text that ``parse_shapes`` reads."""
    return ",".join(map(str, shapes))
