"""What `repfuse explain` says: of each refusal code, in ``refusals.md``, and of topics, in ``topics.md``.

Both have a name and a title, a paragraph, and then what to do, or a list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Explanation:
    """What a refusal code means (``meaning``) and what the user can do (``hint``)."""

    title: str
    meaning: str
    hint: str


@dataclass(frozen=True)
class Topic:
    """A subject in one paragraph (``opening``) and its parts by name (``points``)."""

    title: str
    opening: str
    points: dict[str, str]


def _read(file: str) -> list[tuple[str, str, str, str]]:
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    return re.findall(r"^# (.+?): (.+)\n\n((?:.+\n)+)\n((?:.+\n)+)", text, re.M)


def _joined(text: str) -> str:
    return " ".join(text.split())  # lines are broken anywhere


def _points(text: str) -> dict[str, str]:
    parts = (_joined(part).partition(": ") for part in re.split(r"^- ", text, flags=re.M)[1:])
    return {name: said for name, _, said in parts}


REFUSALS = {code: Explanation(title, _joined(said), _joined(hint)) for code, title, said, hint in _read("refusals.md")}
"""By code; the plan reads this table too."""
TOPICS = {name: Topic(title, _joined(said), _points(points)) for name, title, said, points in _read("topics.md")}
