"""What became of many checkpoints, for people and for a pull request."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from rich.console import RenderableType
from rich.text import Text

from repfuse.report.page import rendered, text
from repfuse.report.schema import report_path
from repfuse.report.tables import BAD, GOOD, NUMBER, duration, heading, plural, size, table

Status = Literal["converted", "nothing-to-fuse", "skipped", "failed"]


@dataclass(frozen=True)
class TaskResult:
    """What became of one checkpoint; ``said`` is its last line, or why it failed. ``peak`` are bytes of its process."""

    source: str
    target: str
    status: Status
    said: str
    seconds: float = 0.0
    peak: int = 0


def many_view(results: Sequence[TaskResult], seconds: float) -> Iterator[RenderableType]:
    """Yield a table of all, those that failed last, and what they come to in a line."""
    yield heading(plural(len(results), "checkpoint"))
    ordered = sorted(results, key=lambda each: (each.status == "failed", each.source))
    yield table(("Checkpoint", "Result", ("Time", NUMBER), ("Memory", NUMBER)), map(_row, ordered))
    failed = any(each.status == "failed" for each in results)
    yield Text(f"\n{summary(results)} in {duration(seconds)}", style=BAD if failed else GOOD)


def _row(each: TaskResult) -> tuple[str, ...]:
    said = f"failed: {each.said}" if each.status == "failed" else each.said
    spent = ("", "") if each.status == "skipped" else (duration(each.seconds), size(each.peak))
    return (each.source, said, *spent)


def summary(results: Sequence[TaskResult]) -> str:
    """Return ``98 converted, 1 skipped, 1 failed``."""
    counts = Counter[str](each.status for each in results)
    return ", ".join(f"{counts[status]} {name}" for status, name in NAMES.items() if counts[status])


NAMES = {
    "converted": "converted",
    "nothing-to-fuse": "with nothing to fuse",
    "skipped": "done before",
    "failed": "failed",
}


def markdown(results: Sequence[TaskResult], seconds: float) -> str:
    """Return the same as a comment: a line, and a table that folds."""
    lines = [
        f"**repfuse**: {summary(results)} in {duration(seconds)}",
        "",
        "<details><summary>Each checkpoint</summary>",
        "",
    ]
    lines += ["| checkpoint | result | time | memory |", "| --- | --- | --: | --: |"]
    lines += [f"| {' | '.join(text(cell) for cell in _row(each))} |" for each in results]
    return "\n".join([*lines, "", "</details>", ""])


def as_html(results: Sequence[TaskResult], seconds: float, folder: Path) -> str:
    """Return the same as a page for this folder, with a link to the page of each; those that failed first."""
    ordered = sorted(results, key=lambda each: (each.status != "failed", each.source))
    return rendered(
        "many.html.j2",
        count=plural(len(results), "checkpoint"),
        summary=summary(results),
        tone="bad" if any(each.status == "failed" for each in results) else "good",
        took=duration(seconds),
        rows=[(_link(each, folder), _row(each)) for each in ordered],
    )


def page_of(report: Path) -> Path:
    """Return where the page of a report goes that a summary links to: fused.pt.report.html."""
    return report.with_suffix(".html")


def _link(each: TaskResult, folder: Path) -> str:
    if each.status == "failed":
        return ""
    if "://" in each.target:  # elsewhere, with its report alone
        return quote(f"{each.target}.report.json", safe=":/")
    page = page_of(report_path(Path(each.target)))
    return quote(Path(os.path.relpath(page, folder)).as_posix())
