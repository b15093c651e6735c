"""What Hypothesis draws programs from."""

from __future__ import annotations

from hypothesis import strategies as st
from support.programs.program import Step

EXAMPLES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((2, 4, 7, 6),),
    ((2, 4, 7, 6),),
    ((2, 4, 7, 6), (2, 4, 7, 6)),
    ((2, 4, 9),),
    ((1, 4, 11, 10, 10),),
    ((3, 4),),
    ((2, 3, 4),),
)
"""Shapes of the inputs: images, two images, sequences, volumes, vectors, tokens.

Volumes of fewer numbers would be tried a thousand longer, too, which takes seconds.
"""

_MIXING = [
    "conv",
    "conv",
    "conv",
    "kept",
    "kept",
    "norm",
    "norm",
    "linear",
    "product",
    "pool",
    "fixed",
    "filled",
    "split",
]
_SCALING = ["constant", "number", "nothing"]
_MOVING = ["pad", "pad", "crop", "choose", "shuffle", "space", "cat"]
_SUMS = ["add", "add", "add", "total"]
_RARE = [
    "transposed",
    "averaged",
    "averaged",
    "side by side",
    "side by side",
    "toward",
    "lora",
    "instance norm",
    "broadcast",
    "gate",
    "written",
    "relu",
    "relu",
    "checkpointed",
]
_INNER = [*_MIXING, *_SCALING, *_MOVING, *_SUMS, "relu"]
_ANY = [*_MIXING, *_MIXING, *_SCALING, *_MOVING, *_SUMS, *_SUMS, *_RARE, "again", "again"]
_BRANCH = ["kept", "kept", "kept", "norm", "nothing", "constant", "fixed", "pool", "conv", "filled", "number"]

_BACKS = st.tuples(*[st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5])] * 3)
_DIGITS = st.lists(st.integers(0, 119), min_size=14, max_size=14).map(tuple)


def _steps(kinds: list[str], least: int, most: int) -> st.SearchStrategy[tuple[Step, ...]]:
    step = st.builds(Step, st.sampled_from(kinds), _BACKS, _DIGITS)
    return st.lists(step, min_size=least, max_size=most).map(tuple)


def _compound(kind: str, inner: st.SearchStrategy[tuple[Step, ...]]) -> st.SearchStrategy[Step]:
    return st.builds(Step, st.just(kind), _BACKS, _DIGITS, inner)


STEPS = st.lists(
    st.one_of(
        st.builds(Step, st.sampled_from(_ANY), _BACKS, _DIGITS),
        st.builds(Step, st.sampled_from(_ANY), _BACKS, _DIGITS),
        _compound("branches", _steps(_BRANCH, 2, 4)),
        _compound("block", _steps(_INNER, 1, 6)),
    ),
    min_size=3,
    max_size=12,
).map(tuple)
"""Steps of a program."""
