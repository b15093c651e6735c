"""JSON-ready data -> plan, with every field checked: anybody may have written or edited it. It knows no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from typing import Any
from unicodedata import category

from repfuse.errors import RepfuseError
from repfuse.planning.cost import Policy
from repfuse.plans import SCHEMA, Cost, Part, Plan, Refusal, Site
from repfuse.refusals import REFUSALS

DOCUMENTS = ("repfuse.plan", "repfuse.inspection", "repfuse.conversion")
"""The kinds of document that hold a plan."""

LARGEST_EXAMPLE = 2**30
"""How many numbers one tensor of a plan's example may have: it is made when the plan replays."""

DEEPEST_EXAMPLE = 32
MOST_AXES = 64

Read = Callable[[Any, str], Any]
"""Checks a value, says what is wrong with it by its place in the data, and returns it as a plan holds it."""


class NotAPlan(ValueError):
    """A value is not what stands at this place of a plan."""


def read_plan(data: Any) -> Plan:
    """Return the plan that ``data`` is or holds. Raises RepfuseError where there is none, or one of another schema."""
    try:
        return _plan(_plan_in(data))
    except NotAPlan as error:
        raise RepfuseError(
            "This is not a plan that repfuse wrote.", f"{error}.", "Make the plan again from the model."
        ) from error


def _plan_in(data: Any) -> Any:
    if not isinstance(data, dict) or "kind" not in data:
        return data
    if data["kind"] not in DOCUMENTS or "plan" not in data:
        raise NotAPlan(f"it is {shown(data['kind'])}, which holds no plan")
    return data["plan"]


def _plan(data: Any) -> Plan:
    if not isinstance(data, dict) or "schema" not in data:
        raise NotAPlan(f"it is {shown(data)} without a schema")
    if data["schema"] != SCHEMA:
        raise RepfuseError(
            f"This plan has schema {shown(data['schema'])}, not {SCHEMA}.",
            "It was written by another version of repfuse.",
            "Make the plan again with this version, or install the version that wrote it.",
        )
    plan: Plan = _PLAN(data, "the plan")
    _once((site.key for site in plan.sites), "two of its sites are the same")
    _once((part.path for part in plan.parts), "two of its parts are the same")
    if unknown := {site.part for site in plan.sites} - {part.path for part in plan.parts}:
        raise NotAPlan(f"it has sites in {shown(sorted(unknown)[0])}, which is none of its parts")
    return plan


def _once(keys: Iterable[Any], otherwise: str) -> None:
    if any(count > 1 for count in Counter(keys).values()):
        raise NotAPlan(otherwise)


def shown(value: Any) -> str:
    """Return so much of a value as fits in a message."""
    if isinstance(value, dict | list):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 50 else f"{text[:50]}..."


def text(value: Any, where: str) -> str:
    """Check a text that can be shown: one with control characters or halves of characters cannot."""
    if not isinstance(value, str):
        raise NotAPlan(f"{where} is {shown(value)} and not a text")
    if any(category(c) in ("Cc", "Cs") and c not in "\t\n" for c in value):
        raise NotAPlan(f"{where} has characters that cannot be shown: {shown(value)}")
    return value


def count(value: Any, where: str) -> int:
    """Check a whole number that is not negative and fits into a machine."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise NotAPlan(f"{where} is {shown(value)} and not a number of things")
    return value


def one_of(known: Collection[str]) -> Read:
    """Check a text that is one of a few."""

    def read(value: Any, where: str) -> str:
        if text(value, where) not in known:
            raise NotAPlan(f"{where} is {shown(value)}, which this version of repfuse does not know")
        return str(value)

    return read


def list_of(inner: Read) -> Read:
    """Check a list, which becomes a tuple."""

    def read(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise NotAPlan(f"{where} is {shown(value)} and not a list")
        return tuple(inner(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read


def _optional(inner: Read) -> Read:
    return lambda value, where: None if value is None else inner(value, where)


def _record(make: Callable[..., Any], fields: Mapping[str, Read], beside: Collection[str] = ()) -> Read:
    """Check a mapping with just these ``fields``, and those ``beside`` that are not read, and ``make`` it."""

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise NotAPlan(f"{where} is {shown(value)} and not a mapping")
        if missing := fields.keys() - value.keys():
            raise NotAPlan(f"{where} has no {min(missing)!r}")
        if unknown := value.keys() - fields.keys() - set(beside):
            raise NotAPlan(f"{where} has {shown(min(map(str, unknown)))}, which does not belong there")
        return make(**{name: inner(value[name], f"{where}.{name}") for name, inner in fields.items()})

    return read


def _example(value: Any, where: str, depth: int = 0) -> Any:
    """Check the description of the arguments that a part was traced with; see tracing/arguments.py."""
    if depth > DEEPEST_EXAMPLE:
        raise NotAPlan(f"{where} goes deeper than {DEEPEST_EXAMPLE} levels")
    match value:
        case {"shape": [*sizes], "dtype": str()} if len(value) == 2 and len(sizes) <= MOST_AXES:
            if prod(count(size, where) for size in sizes) > LARGEST_EXAMPLE:
                raise NotAPlan(f"{where} is a tensor of more than {LARGEST_EXAMPLE:,} numbers")
        case {"list": [*items]} | {"tuple": [*items]} if len(value) == 1:
            for item in items:
                _example(item, where, depth + 1)
        case {"dict": dict(entries)} if len(value) == 1:
            for item in entries.values():
                _example(item, where, depth + 1)
        case {"value": None | bool() | int() | float() | str()} | {"float": "inf" | "-inf" | "nan"} if len(value) == 1:
            pass
        case _:
            raise NotAPlan(f"{where} holds {shown(value)}, which describes no argument")
    return value


_COST = _record(Cost, dict.fromkeys(("macs", "bytes", "launches", "parameters"), count))
_TEXTS = list_of(text)
_SITE = _record(
    Site,
    {
        **dict.fromkeys(("path", "owner", "form", "kernel", "source", "output", "part"), text),
        **dict.fromkeys(("branches", "nodes"), _TEXTS),
        **dict.fromkeys(("before", "after"), _COST),
    },
)
_REFUSAL = _record(
    Refusal,
    {
        "code": one_of(REFUSALS),
        **dict.fromkeys(("where", "reason"), text),
        **dict.fromkeys(("before", "after"), _optional(_COST)),
    },
    beside=("hint",),
)
_PART = _record(
    Part,
    {
        **dict.fromkeys(("path", "fingerprint"), text),
        "arguments": _example,
        **dict.fromkeys(("matching_borders", "shared"), _TEXTS),
    },
)
_PLAN = _record(
    Plan,
    {
        "policy": one_of([str(policy) for policy in Policy]),
        "sites": list_of(_SITE),
        "refusals": list_of(_REFUSAL),
        "parts": list_of(_PART),
    },
    beside=("schema",),
)
