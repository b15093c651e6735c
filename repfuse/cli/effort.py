"""How much is tried: the options of `verify` and `convert`. torch is not imported."""

from __future__ import annotations

from typing import Annotated

import typer

from repfuse.cli.options import CHECKING

Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Only the example and small inputs, at about a quarter of its size: seconds, for a first look.",
        rich_help_panel=CHECKING,
    ),
]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough",
        help="More random inputs, every kind of input at three sizes, larger batches and 32 sizes in a row (each phase "
        "of a stride): several times as long.",
        rich_help_panel=CHECKING,
    ),
]


def effort_of(*, quick: bool, thorough: bool) -> str:
    """Return the effort by name. Raises typer.BadParameter where both are asked for."""
    if quick and thorough:
        raise typer.BadParameter("give --quick or --thorough, not both.")
    return "quick" if quick else "thorough" if thorough else "default"
