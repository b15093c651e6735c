"""`repfuse explain`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

import typer

from repfuse.cli.options import Json
from repfuse.cli.output import show, show_json
from repfuse.errors import RepfuseError
from repfuse.refusals import REFUSALS
from repfuse.topics import TOPICS


def _names(begun: str) -> list[str]:
    return [name for name in (*TOPICS, *sorted(REFUSALS)) if name.startswith(begun)]


def explain(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A topic, or a refusal's code. Without it: the list of all.",
            autocompletion=_names,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a refusal means and what to do about it, or all about a topic.

    \b
    Examples:
      repfuse explain
      repfuse explain training-norm
      repfuse explain verdicts
    """
    from repfuse.report.plan_view import explain_view, list_view, topic_view

    topics = {key: topic for key, topic in TOPICS.items() if name in (None, key)}
    codes = {key: refusal for key, refusal in REFUSALS.items() if name in (None, key)}
    if not topics and not codes:
        close = get_close_matches(str(name), [*TOPICS, *REFUSALS])
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise RepfuseError(f"There is no refusal code or topic {name!r}.", "", f"{hint}`repfuse explain` lists all.")
    if as_json:
        told: dict[str, dict[str, Any]] = {
            "topics": {key: vars(topic) for key, topic in topics.items()},
            "codes": {key: vars(refusal) for key, refusal in codes.items()},
        }
        show_json("explanations", told)
    elif name is None:
        show(list_view(topics, codes))
    elif name in topics:
        show(topic_view(name, topics[name]))
    else:
        show(explain_view(name, codes[name]))
