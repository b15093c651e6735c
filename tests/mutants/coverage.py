"""Which test files are to find the mutants of which file: the cheapest first, since the first failure ends a run."""

from __future__ import annotations

ALGEBRA = "repfuse/algebra/"
OPS = "repfuse/ops/"

_MAPS = ("geometry", "channels", "affine", "composition")
_MEANINGS = ("ops", "ops_idioms", "ops_refused", "refusals")

TESTS: dict[str, tuple[str, ...]] = {
    f"{ALGEBRA}affine.py": ("affine", "channels", "evaluation", "composition"),
    f"{ALGEBRA}borders.py": _MAPS,
    f"{ALGEBRA}channels.py": ("channels", "affine", "composition"),
    f"{ALGEBRA}descriptions.py": ("evaluation", "report_views"),
    f"{ALGEBRA}evaluation.py": ("evaluation", "transposed"),
    f"{ALGEBRA}expression.py": ("evaluation", "transposed"),
    f"{ALGEBRA}geometry.py": (*_MAPS, "ops"),
    f"{ALGEBRA}kernels.py": ("affine", "channels", "evaluation", "composition"),
    f"{ALGEBRA}layers.py": ("evaluation",),
    f"{ALGEBRA}summing.py": ("affine", "evaluation"),
    f"{ALGEBRA}taps.py": _MAPS,
    f"{ALGEBRA}transposed.py": ("transposed",),
    f"{OPS}convolution.py": (*_MEANINGS, "geometry"),
    f"{OPS}layout.py": ("ops", "rewrite"),
}


def tests_of(path: str) -> tuple[str, ...]:
    """Return the test files, as paths."""
    return tuple(f"tests/test_{name}.py" for name in TESTS.get(path, _MEANINGS))
