"""`repfuse report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repfuse.cli.options import output
from repfuse.cli.output import Form, check_page, write_pages


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="The report of a conversion, as fused.pt.report.json; beside it, if you like, what `repfuse bench "
            "--json` and `repfuse verify --json` printed of the same two files.",
        ),
    ],
    *,
    html: Annotated[
        Path | None,
        output("--html", metavar="OUT", help="Write a page; - prints it."),
    ] = None,
    markdown: Annotated[
        Path | None,
        output("--markdown", metavar="OUT", help="Write a comment for a pull request; - prints it."),
    ] = None,
    force: Annotated[bool, output("--force", help="Replace OUT.")] = False,
) -> None:
    """Make a page of a report, to be forwarded.

    The page is one file of HTML: no script, nothing that is fetched; light and
    dark, on a screen and on paper. As Markdown it is ten lines and a folded
    table.

    \b
    Examples:
      repfuse report fused.pt.report.json --html fused.html
      repfuse report fused.pt.report.json --markdown -
      repfuse bench model.pt fused.pt --json > bench.json
      repfuse verify model.pt fused.pt --data val/ --json > verify.json
      repfuse report fused.pt.report.json bench.json verify.json --html all.html
    """
    wanted: tuple[tuple[Form, Path | None], ...] = (("html", html), ("markdown", markdown))
    pages = [(form, out) for form, out in wanted if out]
    if not pages:
        raise typer.BadParameter("give --html OUT, --markdown OUT or both.", param_hint="--html")
    if html == markdown:
        raise typer.BadParameter("give two places, one for each.", param_hint="--markdown")
    for form, out in pages:
        check_page(form, out, files, force=force)
    from repfuse.report.reading import read, told

    write_pages(told([read(path) for path in files]), pages)
