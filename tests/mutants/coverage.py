"""Which test files are to find the mutants of which file: the cheapest first, since the first failure ends a run."""

from __future__ import annotations

ALGEBRA = "repfuse/algebra/"
OPS = "repfuse/ops/"

_MAPS = ("geometry", "channels", "affine", "composition")
_MEANINGS = ("ops", "ops_idioms", "ops_refused", "refusals")

TESTS: dict[str, tuple[str, ...]] = {
    f"{ALGEBRA}affine.py": ("affine", "channels", "evaluation", "composition", "transposed"),
    f"{ALGEBRA}evaluation.py": ("evaluation", "transposed"),
    f"{ALGEBRA}expression.py": ("evaluation", "transposed", "report_views", "rows"),
    f"{ALGEBRA}geometry.py": (*_MAPS, "transposed", "ops"),
    f"{ALGEBRA}layers.py": ("channels", "affine", "composition", "evaluation"),
    f"{ALGEBRA}transposed.py": ("transposed",),
    f"{OPS}channels.py": (*_MEANINGS, "rows"),
    f"{OPS}convolution.py": (*_MEANINGS, "geometry", "transposed", "rows"),
    f"{OPS}indexing.py": (*_MEANINGS, "rewrite"),
    f"{OPS}products.py": ("products", "turned", *_MEANINGS),
    f"{OPS}sums.py": (*_MEANINGS, "norms_that_stay"),
    f"{OPS}table.py": (*_MEANINGS, "rows", "turned", "search", "hazards", "constants", "modules_dtypes"),
}


def tests_of(path: str) -> tuple[str, ...]:
    """Return the test files, as paths."""
    return tuple(f"tests/test_{name}.py" for name in TESTS.get(path, _MEANINGS))
