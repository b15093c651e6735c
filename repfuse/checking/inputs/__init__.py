"""The inputs on which two networks are compared. A mistake is only found where an input brings it out."""

from repfuse.checking.inputs.trial import (
    Effort,
    Shape,
    Trial,
    elements,
    is_floating,
    known_effort,
    mapped,
    rounded_through,
)
from repfuse.checking.inputs.variants import input_variants, shaped

__all__ = [
    "Effort",
    "Shape",
    "Trial",
    "elements",
    "input_variants",
    "is_floating",
    "known_effort",
    "mapped",
    "rounded_through",
    "shaped",
]
