"""The inputs on which two networks are compared. A mistake is only found where an input brings it out."""

from repfuse.verifying.inputs.effort import Effort, known_effort
from repfuse.verifying.inputs.trial import Shape, Trial, elements, is_floating, mapped, rounded_through
from repfuse.verifying.inputs.variants import input_variants, shaped

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
