"""How much is tried: the inputs of each level of effort."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from repfuse.errors import RepfuseError


class Effort(StrEnum):
    """How many inputs are tried, and how large ones."""

    QUICK = "quick"
    """The example, and every kind of input at about a quarter of its size: seconds."""

    DEFAULT = "default"
    """The example, every kind of input at about half of its size, and small sizes, odd and even."""

    THOROUGH = "thorough"
    """More random inputs, every kind at three sizes, larger batches, and 32 sizes in a row: each phase of a stride."""


@dataclass(frozen=True)
class Scope:
    """What an effort comes to.

    ``parts`` are the divisors of the example's size at which every kind of input is tried, ``small`` the sizes of a few
    pixels, ``in_a_row`` how many consecutive sizes, ``batches`` what is added to the batch. On ``yardsticks`` trials
    the effect of rounding is measured in any case, which costs as much as the network has weights.
    """

    seeds: tuple[int, ...]
    parts: tuple[int, ...]
    small: tuple[int, ...]
    yardsticks: int
    batches: tuple[int, ...] = (1,)
    in_a_row: int = 0


# Small sizes are less than a kernel's reach, odd and even: there mistakes at the border are all there is.
SCOPES = {
    Effort.QUICK: Scope(seeds=(0,), parts=(4,), small=(1, 2, 3), yardsticks=1),
    Effort.DEFAULT: Scope(seeds=(0,), parts=(2,), small=(1, 2, 3, 5, 7), yardsticks=3),
    Effort.THOROUGH: Scope(
        (0, 1, 2, 3), (1, 2, 4), (1, 2, 3, 4, 5, 6, 7, 9), yardsticks=7, batches=(1, 6), in_a_row=32
    ),
}


def known_effort(effort: Effort | str) -> Effort:
    """Return the effort of this name. Raises RepfuseError where there is none."""
    if effort not in SCOPES:
        raise RepfuseError(f"There is no effort {str(effort)!r}.", "", f"Choose one of {', '.join(SCOPES)}.")
    return Effort(effort)


def scope_of(effort: Effort | str) -> Scope:
    """Return what an effort comes to. Raises RepfuseError where there is none of this name."""
    return SCOPES[known_effort(effort)]
