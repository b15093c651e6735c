"""`repfuse explain`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated

import typer

from repfuse.cli.options import Json
from repfuse.cli.output import show, show_json
from repfuse.errors import RepfuseError
from repfuse.refusals import REFUSALS, Explanation


def _codes(begun: str) -> list[str]:
    return [code for code in sorted(REFUSALS) if code.startswith(begun)]


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE", help="A refusal's code. Without it: the list of all codes.", autocompletion=_codes
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a refusal means and what to do about it.

    \b
    Examples:
      repfuse explain
      repfuse explain training-norm
    """
    from repfuse.report.explain_view import codes_view, explain_view

    chosen = {code: _explanation(code)} if code else REFUSALS
    if as_json:
        show_json("refusals", {"codes": {name: vars(entry) for name, entry in chosen.items()}})
    elif code:
        show(explain_view(code, chosen[code]))
    else:
        show(codes_view(chosen))


def _explanation(code: str) -> Explanation:
    if code in REFUSALS:
        return REFUSALS[code]
    close = get_close_matches(code, REFUSALS)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise RepfuseError(f"There is no refusal code {code!r}.", "", f"{hint}`repfuse explain` lists all codes.")
