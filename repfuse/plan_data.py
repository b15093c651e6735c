"""JSON-ready data -> plan, with every field checked: anybody may have written or edited it. It knows no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import isfinite, prod
from typing import Any

from repfuse.checked import NotAPlan, count, flag, list_of, one_of, optional, record, shown, text
from repfuse.errors import RepfuseError
from repfuse.planning.cost import Policy
from repfuse.plans import AGAIN, SCHEMA, Cost, Plan, Refusal, Site
from repfuse.refusals import REFUSALS

DOCUMENTS = ("repfuse.plan", "repfuse.inspection", "repfuse.conversion")
"""The kinds of document that hold a plan."""

LARGEST_EXAMPLE = 2**28
"""How many numbers the example may have: it is made when the plan replays."""

DEEPEST_EXAMPLE = 32
MOST_AXES = 64


def read_plan(data: Any) -> Plan:
    """Return the plan that ``data`` is or holds. Raises RepfuseError where there is none, or one of another schema."""
    try:
        return _plan(_plan_in(data))
    except NotAPlan as error:
        raise RepfuseError("This is not a plan that repfuse wrote.", f"{error}.", AGAIN) from error


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
    return plan


def _once(keys: Iterable[Any], otherwise: str) -> None:
    if any(count > 1 for count in Counter(keys).values()):
        raise NotAPlan(otherwise)


def _example(value: Any, where: str, depth: int = 0) -> Any:
    """Check the description of the arguments that the network was recorded with; see recording/arguments.py."""
    if depth > DEEPEST_EXAMPLE:
        raise NotAPlan(f"{where} goes deeper than {DEEPEST_EXAMPLE} levels")
    match value:
        case {"shape": [*sizes], "dtype": dtype} if len(value) == 2:
            _tensor(sizes, dtype, where)
        case {"list": [*items]} | {"tuple": [*items]} if len(value) == 1:
            for item in items:
                _example(item, where, depth + 1)
        case {"dict": dict(entries)} if len(value) == 1:
            for item in entries.values():
                _example(item, where, depth + 1)
        case {"value": plain} if len(value) == 1 and _is_plain(plain):
            pass
        case {"float": "inf" | "-inf" | "nan"} if len(value) == 1:
            pass
        case _:
            raise NotAPlan(f"{where} holds {shown(value)}, which describes no argument")
    return value


def _arguments(value: Any, where: str) -> Any:
    """Check a description, and that its tensors together are no larger than an example may be."""
    if _numbers(_example(value, where)) > LARGEST_EXAMPLE:
        raise NotAPlan(f"{where} has tensors of more than {LARGEST_EXAMPLE:,} numbers")
    return value


def _numbers(value: Any) -> int:
    match value:
        case {"shape": sizes}:
            return prod(sizes)
        case {"list": items} | {"tuple": items}:
            return sum(map(_numbers, items))
        case {"dict": entries}:
            return sum(map(_numbers, entries.values()))
    return 0


def _is_plain(value: Any) -> bool:
    """Whether JSON has the value; its infinities have names."""
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))


def _tensor(sizes: Sequence[Any], dtype: Any, where: str) -> None:
    if not text(dtype, where).isidentifier():
        raise NotAPlan(f"{where} has a tensor of {shown(dtype)}, which is no dtype")
    for size in sizes:
        count(size, where)
    if len(sizes) > MOST_AXES:
        raise NotAPlan(f"{where} has a tensor of more than {MOST_AXES} axes")


_COST = record(Cost, dict.fromkeys(("macs", "bytes", "launches", "parameters"), count))
_TEXTS = list_of(text)
_SITE = record(
    Site,
    {
        **dict.fromkeys(("path", "owner", "form", "kernel", "source", "output"), text),
        **dict.fromkeys(("branches", "nodes"), _TEXTS),
        **dict.fromkeys(("before", "after"), _COST),
    },
)
_REFUSAL = record(
    Refusal,
    {
        "code": one_of(REFUSALS),
        **dict.fromkeys(("where", "reason"), text),
        **dict.fromkeys(("before", "after"), optional(_COST)),
    },
    beside=("hint",),
)
_PLAN = record(
    Plan,
    {
        "policy": one_of([str(policy) for policy in Policy]),
        "sites": list_of(_SITE),
        "refusals": list_of(_REFUSAL),
        "fingerprint": text,
        "arguments": _arguments,
        "keep_class": flag,
        "matching_borders": _TEXTS,
    },
    beside=("schema",),
)
