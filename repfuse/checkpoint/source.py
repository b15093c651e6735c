"""How a network is built: what ``--model`` and ``--model-arg`` say, as data and as text."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from collections.abc import Iterable

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
