"""What a refusal code means, and the list of codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from repfuse.refusals import Explanation
from repfuse.report.tables import facts


def explain_view(code: str, explanation: Explanation) -> Iterator[RenderableType]:
    """Yield the meaning of one code and what to do."""
    yield Text.assemble((code, "bold yellow"), f": {explanation.title}")
    yield Padding(facts([("meaning", explanation.meaning), ("do", explanation.hint)]), (1, 0, 0, 0))


def codes_view(table: Mapping[str, Explanation]) -> Iterator[RenderableType]:
    """Yield every code with its title."""
    yield facts((code, table[code].title) for code in sorted(table))
