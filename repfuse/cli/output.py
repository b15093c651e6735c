"""The one place that writes: the result on standard output, progress, notes and errors on standard error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console, RenderableType

from repfuse.checkpoint.files import check_target, replacing, together
from repfuse.checkpoint.formats import is_hub_name, is_snapshot, recognise
from repfuse.errors import RepfuseError
from repfuse.report.schema import Told, envelope, to_json
from repfuse.wording import Progress, printable

Form = Literal["html", "markdown"]
STDOUT = Path("-")

# Where a command writes, and whether it can. torch is not needed to say no, so it is not imported.


def check_targets(targets: Sequence[Path], sources: Sequence[Path], *, force: bool) -> None:
    """Raise RepfuseError where a file, all in one folder, must not or cannot be written; ``sources`` are read."""
    for target, source in product(targets, sources):
        check_target(target, source, force=force)
    folder = targets[0].parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        what = f"Nothing can be written to the folder {folder}."
        raise RepfuseError(what, error.strerror or str(error), "Give a folder that you may write to.") from error


def check_sources(sources: Sequence[Path]) -> None:
    """Raise RepfuseError where what is to be read is no checkpoint. What is fetched, or a snapshot, is not opened."""
    for source in sources:
        if not is_hub_name(source) and not is_snapshot(source):
            recognise(source)


def show(view: Iterable[RenderableType]) -> None:
    """Print a rendering on standard output, as wide as the terminal."""
    console = Console(highlight=False)
    with console.capture() as capture:
        for part in view:
            console.print(part)
    lines = (line.rstrip() for line in capture.get().splitlines())  # Rich pads every line to the full width
    _write(sys.stdout, "\n".join(lines) + "\n")


def show_json(kind: str, data: dict[str, Any]) -> None:
    """Print a result as strict JSON on standard output."""
    _write(sys.stdout, to_json(envelope(kind, data)))


def page_form(out: Path) -> Form:
    """Return as what a page is written, by its name. Raises RepfuseError where that does not say it."""
    forms: dict[str, Form] = {".html": "html", ".htm": "html", ".md": "markdown"}
    if out.suffix.lower() not in forms:
        raise RepfuseError(f"{out} does not say what a page is written as.", "", "Name it PAGE.html or PAGE.md.")
    return forms[out.suffix.lower()]


def check_page(out: Path | None, sources: Sequence[Path], form: Form | None = None, *, force: bool) -> None:
    """Raise RepfuseError where a page that is wanted cannot be made, or not be written; ``-`` is standard output.

    The name says of what form it is, where that is not said.
    """
    if out is None:
        return
    if (form or page_form(out)) == "html":
        from repfuse.report.page import templates

        templates()
    if out != STDOUT:
        check_targets((out,), sources, force=force)


def write_pages(told: Told, pages: Iterable[tuple[Form, Path]]) -> None:
    """Write what was told as HTML or as Markdown: all of the pages, or none."""
    from repfuse.report.page import as_html, as_markdown

    with together():
        for form, out in pages:
            write_page(as_html(told) if form == "html" else as_markdown(told), out)


def write_page(text: str, out: Path) -> None:
    """Write a page; ``-`` is standard output."""
    if out == STDOUT:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr] # as the page says of itself
        _write(sys.stdout, text)
    else:
        with replacing(out) as temporary:
            temporary.write_text(text, encoding="utf-8")


def say(line: str) -> None:
    """Print a line or more on standard error. What a file says may hold control characters: they are shown as such."""
    _write(sys.stderr, printable(line) + "\n")


def notes(about: object, lines: Iterable[str], *, quiet: bool) -> None:
    """Print what the user must be told about a file on standard error."""
    for line in lines if not quiet else ():
        say(f"note: {about}: {line}")


def say_error(error: RepfuseError) -> None:
    """Print what went wrong, why and what to do on standard error."""
    head, *rest = str(error).splitlines()
    say("\n".join([f"error: {head}", *(f"  {line}" for line in rest)]))


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Give a function that shows (stage, fraction done) on standard error; silent where that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _stage, _fraction: None
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=1.0)
        yield lambda stage, fraction: bars.update(task, description=stage, completed=fraction)


def _write(stream: TextIO, text: str) -> None:
    """Write all of ``text``. Where the reader has gone (`| head`) the rest is dropped, and the exit code stays ours."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
