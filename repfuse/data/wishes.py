"""What the user says of the data: `--mean`, `--std`, `--limit`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from repfuse.errors import RepfuseError

Numbers = tuple[float, ...]
FORM = "Write numbers with commas between them, one per channel or one for all: --mean 0.485,0.456,0.406"


@dataclass(frozen=True)
class Wishes:
    """``mean`` and ``std`` per channel (or one for all), for pixels in 0..1; at most ``limit`` samples.

    Raises RepfuseError where a number cannot be meant.
    """

    mean: Numbers | None = None
    std: Numbers | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.mean and max(self.mean) > 1:
            what, why = f"A mean of {max(self.mean):g} is beyond the pixels.", "They are scaled to 0..1 first."
            raise RepfuseError(what, why, "Divide the mean and the standard deviation by 255.")
        if self.std and min(self.std) <= 0:
            raise RepfuseError("A standard deviation must be above 0.", "", FORM.replace("mean", "std"))
        if self.limit is not None and self.limit < 1:
            raise RepfuseError("The limit of samples must be at least 1.", "", "Leave --limit out to take all.")

    @property
    def normalises(self) -> bool:
        """Whether a mean or a standard deviation is asked for."""
        return self.mean is not None or self.std is not None


def parse_numbers(text: str | None) -> Numbers | None:
    """Return the numbers in ``0.485,0.456,0.406``. Raises RepfuseError where it is another text."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RepfuseError(f"{text!r} is no list of numbers.", "", FORM) from error
    if not all(map(math.isfinite, numbers)):
        raise RepfuseError(f"{text!r} holds a number that is not finite.", "", FORM)
    return numbers
