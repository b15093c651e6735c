"""What is said of a network, as data and as text: how it is built (--model, --model-arg), and its inputs (--input).

It knows no torch: a mistake in what is said is found at once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from repfuse.errors import RepfuseError

FORMS = "timm:NAME, torchvision:NAME, package.module:callable or path/to/file.py:callable"


@dataclass(frozen=True)
class ModelSource:
    """A way to build a network: ``spec`` names it (see FORMS), ``arguments`` are its keyword arguments."""

    spec: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``timm``, ``torchvision``, ``file`` or ``import``."""
        where, name = self.parts
        if where in ("timm", "torchvision"):
            return where
        return "file" if where.endswith(".py") and name else "import"

    @property
    def parts(self) -> tuple[str, str]:
        """Where and what: (``timm``, ``repvgg_a0``), (``path/to/file.py``, ``build``)."""
        of_library = self.spec.startswith(("timm:", "torchvision:"))
        where, _, name = self.spec.partition(":") if of_library else self.spec.rpartition(":")
        return where, name

    @property
    def options(self) -> str:
        """What says so on the command line: ``--model net.py:build --model-arg n=3``."""
        return " ".join([f"--model {self.spec}", *(f"--model-arg {text}" for text in as_texts(self) or ())])

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.spec}({listed})" if listed else self.spec


@dataclass(frozen=True)
class Said:
    """What somebody else says of a checkpoint that does not say it itself: how its network is built, and its input as
    --input takes it. ``by`` is who says so. An input that nobody ``asked`` for is better than a guess, and no more.
    """

    by: str
    source: ModelSource | None = None
    input: str | None = None
    asked: bool = True


def model_source(spec: str, arguments: Mapping[str, Any] | Iterable[str] | None = None) -> ModelSource:
    """Return the source that ``spec`` names; ``arguments`` is a mapping, or texts such as ``num_classes=10``.

    Raises RepfuseError where the spec or an argument is not of a form that repfuse knows.
    """
    source = ModelSource(spec, _arguments(arguments or {}))
    where, name = source.parts
    dotted = source.kind != "import" or all(map(str.isidentifier, where.split(".")))
    if not where or not name or not dotted:
        named = f"Name what in it builds the network, a function or a class: {spec}:NAME."
        hint = named if spec.endswith(".py") else f"Use {FORMS}."
        raise RepfuseError(f"{spec!r} does not say how to build a network.", "", hint)
    return source


def as_texts(source: ModelSource) -> list[str] | None:
    """Return the arguments as ``name=value`` texts, or None where a value has no literal form."""
    texts = [f"{name}={value!r}" for name, value in source.arguments.items()]
    try:
        return texts if _arguments(texts) == source.arguments else None
    except RepfuseError:
        return None


def _arguments(given: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    return dict(_argument(text) for text in given)


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise RepfuseError(f"{text!r} is not a model argument.", "", "Write name=value, such as num_classes=10.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value


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
