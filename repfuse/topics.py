"""What one may want to know before or after a run, in ``topics.md``: ``repfuse explain TOPIC`` shows it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Topic:
    """A subject in one paragraph (``opening``) and its parts by name (``points``)."""

    title: str
    opening: str
    points: dict[str, str]


def _topic(title: str, opening: str, points: str) -> Topic:
    """Return a topic of its title, its paragraph and its list, whose lines are broken anywhere."""
    parts = (" ".join(part.split()).partition(": ") for part in re.split(r"^- ", points, flags=re.M)[1:])
    return Topic(title, " ".join(opening.split()), {name: text for name, _, text in parts})


_TEXT = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
TOPICS = {name: _topic(*said) for name, *said in re.findall(r"^# (.+?): (.+)\n\n((?:.+\n)+)\n((?:.+\n)+)", _TEXT, re.M)}
"""What `repfuse explain` knows, by name."""
