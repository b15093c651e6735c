"""Small blocks as their authors write them, each with what must become of it; the spellings are our own."""

from __future__ import annotations

from blocks import (
    asymmetric,
    basic,
    channels,
    costly,
    diverse,
    edges,
    large,
    linears,
    mixers,
    norms,
    rows,
    space,
    transposed,
    weights,
)
from blocks.basic import RepVGG, TracedNorm
from blocks.building import (
    Branches,
    C,
    Case,
    Spelled,
    SpelledOfTwo,
    Twin,
    conv,
    conv_norm,
    norm,
    pair,
    pair_of_two,
    triple,
)

_FAMILIES = (
    basic,
    asymmetric,
    diverse,
    large,
    mixers,
    edges,
    weights,
    channels,
    linears,
    norms,
    rows,
    space,
    transposed,
    costly,
)

CASES: list[Case] = [case for family in _FAMILIES for case in family.CASES]
TWINS: list[Twin] = [twin for family in _FAMILIES for twin in getattr(family, "TWINS", [])]

__all__ = [
    "CASES",
    "TWINS",
    "Branches",
    "C",
    "Case",
    "RepVGG",
    "Spelled",
    "SpelledOfTwo",
    "TracedNorm",
    "Twin",
    "conv",
    "conv_norm",
    "norm",
    "pair",
    "pair_of_two",
    "triple",
]
