"""What a topic tells, what a refusal code means, and the list of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from repfuse.refusals import Explanation
from repfuse.report.tables import facts, heading
from repfuse.topics import Topic


def explain_view(code: str, explanation: Explanation) -> Iterator[RenderableType]:
    """Yield the meaning of one code and what to do."""
    yield Text.assemble((code, "bold yellow"), f": {explanation.title}")
    yield Padding(facts([("meaning", explanation.meaning), ("do", explanation.hint)]), (1, 0, 0, 0))


def topic_view(name: str, topic: Topic) -> Iterator[RenderableType]:
    """Yield what one topic tells."""
    yield Text.assemble((name, "bold yellow"), f": {topic.title}")
    yield Padding(Text(topic.opening), (1, 0))
    yield facts(topic.points.items())


def list_view(topics: Mapping[str, Topic], codes: Mapping[str, Explanation]) -> Iterator[RenderableType]:
    """Yield every topic and every code with its title."""
    yield heading("Topics")
    yield facts((name, topics[name].title) for name in topics)
    yield heading("Refusals")
    yield facts((code, codes[code].title) for code in sorted(codes))
