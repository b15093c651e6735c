"""The tolerances of `verify`. torch is not imported."""

from __future__ import annotations

from typing import Annotated

import typer

TOLERANCES = "Tolerances in place of what rounding explains"

Rtol = Annotated[
    float | None,
    typer.Option(
        "--rtol",
        metavar="NUMBER",
        help="Call the networks the same where |a - b| <= atol + rtol |a| for every element, in float64 and as stored, "
        "a being the original's. Without --atol, that is 0.",
        rich_help_panel=TOLERANCES,
    ),
]
Atol = Annotated[
    float | None,
    typer.Option("--atol", metavar="NUMBER", help="As --rtol. Without --rtol, that is 0.", rich_help_panel=TOLERANCES),
]
