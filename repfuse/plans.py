"""The plan: what will be rewritten, what will not, and why; as data, and read from it. It knows no torch.

Anybody may have written or edited a plan, so all of it is checked as it is read. The types of the fields say what may
stand there; pydantic checks it, and is imported when the first plan is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from math import inf, isfinite, prod
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated, Any, ClassVar
from unicodedata import category

from annotated_types import Ge, Gt, Lt, Predicate

from repfuse.errors import RepfuseError
from repfuse.explanations import REFUSALS
from repfuse.wording import first_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA = 5
AGAIN = "Make the plan again from this model."  # what to do with a plan that does not fit

DOCUMENTS = ("repfuse.plan", "repfuse.inspection", "repfuse.conversion")
"""The kinds of document that hold a plan."""

LARGEST_EXAMPLE = 2**28
"""How many numbers the example may have: it is made when the plan replays."""

MOST_AXES = 64


def _can_be_shown(text: str) -> bool:
    return not any(category(c) in ("Cc", "Cs") and c not in "\t\n" for c in text)


def _numbers(value: Any) -> int:
    """Return how many numbers the tensors have that ``value`` describes; see recording/arguments.py.

    Raises ValueError where it describes no arguments.
    """
    match value:
        case {"shape": [*sizes]} if len(sizes) > MOST_AXES:
            raise ValueError(f"it has a tensor of more than {MOST_AXES} axes")
        case {"shape": [*sizes], "dtype": str(dtype), **rest} if not rest and dtype.isidentifier():
            if all(type(size) is int and 0 <= size < 2**63 for size in sizes):
                return prod(sizes)
        case {"list": [*items], **rest} | {"tuple": [*items], **rest} if not rest:
            return sum(_numbers(item) for item in items)
        case {"dict": dict(entries), **rest} if not rest:
            return sum(_numbers(item) for item in entries.values())
        case {"value": None | bool() | int() | str(), **rest} | {"float": "inf" | "-inf" | "nan", **rest} if not rest:
            return 0
        case {"value": float(number), **rest} if not rest and isfinite(number):
            return 0
    raise ValueError(f"{_shown(value)} describes no argument")


Text = Annotated[str, Predicate(_can_be_shown)]
"""A text that can be shown: one with control characters or halves of characters cannot."""

Count = Annotated[int, Ge(0), Lt(2**63)]
"""A number of things that fits into a machine."""

Ratio = Annotated[float, Gt(0), Lt(inf)]
"""Of two times."""

Key = tuple[str, str, frozenset[str]]
"""The source, output and nodes of a site."""


class Policy(StrEnum):
    """What is merged, of all that can be merged exactly."""

    COST = "cost"
    """What is predicted to be faster."""

    ALWAYS = "always"
    """Whatever needs fewer operators, also where that means more work."""

    NEVER_COMPOSE = "never-compose"
    """As ``cost``, but layers in a row stay layers in a row: only branches, normalisations and constants are merged."""


class NoMore:
    """Has pydantic refuse what a mapping holds beside the fields of a dataclass."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Cost(NoMore):
    """What a computation costs at the example's shape, predicted and not measured.

    ``macs`` multiply-accumulates, ``bytes`` read and written (weights, inputs, outputs), ``launches`` kernels
    started, ``parameters`` numbers stored.
    """

    macs: Count = 0
    bytes: Count = 0
    launches: Count = 0
    parameters: Count = 0

    def __add__(self, other: Cost) -> Cost:
        return total((self, other))


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs."""
    columns = zip(*((each.macs, each.bytes, each.launches, each.parameters) for each in costs), strict=True)
    return Cost(*map(sum, columns))


@dataclass(frozen=True)
class Refusal(NoMore):
    """A place that looked fusible and is not. ``code`` is stable; ``where`` is a module path or a graph node."""

    code: str
    where: Text
    reason: Text
    before: Cost | None = None
    after: Cost | None = None

    @property
    def hint(self) -> str:
        """What the user can do about a refusal of this kind."""
        return REFUSALS[self.code].hint


@dataclass(frozen=True)
class Site(NoMore):
    """One region that becomes one convolution.

    ``path`` is where the fused convolution lives afterwards, ``owner`` the smallest module that holds the region,
    ``form`` how the owner is rewritten: ``fold`` (new weights in a convolution that was there), ``swap`` (in the place
    of one of several modules in a row), ``chain`` (stock modules in a row) or ``graph`` (a GraphModule of that block).
    ``branches`` describes each merged branch, ``kernel`` the fused convolution. ``source``, ``output`` and ``nodes``
    name operations by the call of a module that made them, ``stages.0.conv/conv2d``; with them the plan replays on the
    same model. The fields are in the order in which people read them.
    """

    path: Text
    branches: tuple[Text, ...]
    kernel: Text
    before: Cost
    after: Cost
    owner: Text
    form: Text
    source: Text
    output: Text
    nodes: tuple[Text, ...]

    @property
    def key(self) -> Key:
        """What identifies the site in the model: the rest follows from it."""
        return self.source, self.output, frozenset(self.nodes)

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that the site goes by: its own, and those of the modules around it, the model apart."""
        paths = (path for path in (self.path or ROOT, self.owner) if path)
        return tuple(dict.fromkeys(name for path in paths for name in (path, *reversed(above(path)))))

    def left_out(self, include: Sequence[str], exclude: Sequence[str]) -> str | None:
        """Return why these globs leave the site out, or None."""
        if (glob := first_match(self.names, exclude)) is not None:
            return f"it is left out by {glob!r}"
        if include and first_match(self.names, include) is None:
            return f"it is not among {', '.join(map(repr, include))}"
        return None

    def without(self, code: str, why: str) -> Refusal:
        """Return the refusal that says that the site is not merged."""
        return Refusal(code, self.path or ROOT, why, self.before, self.after)


@dataclass(frozen=True)
class Measured(NoMore):
    """What was timed where the law of cost is in doubt: how many times as fast what computes ``output`` is as one
    layer as it is in parts, with a 95 % interval. What is faster is merged, what is slower is not, whatever is
    predicted.
    """

    output: Text
    speedup: Ratio
    low: Ratio
    high: Ratio

    def __str__(self) -> str:
        return f"measured to be {self.speedup:.2f}x as fast as one ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Plan(NoMore):
    """Sites and refusals of one model.

    ``policy`` is what was to be merged. ``fingerprint`` identifies the modules that the sites refer to, ``arguments``
    describe what it was made with. ``matching_borders`` are the layers, each behind its source, that pad with what lies
    beyond the border, as far as that depends on the weights. ``keep_class`` says that the outermost module gets no new
    forward, ``keep_affine`` that a BatchNorm stays behind each convolution that is merged. ``measured`` goes before
    what is predicted; ``equalized`` says that the weights of the result were rescaled after it. ``live`` saves
    ``rewrite`` a second recording in the same process and is never serialised.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    policy: Policy
    fingerprint: Text
    arguments: Any
    matching_borders: tuple[Text, ...] = ()
    keep_class: bool = False
    keep_affine: bool = False
    measured: tuple[Measured, ...] = ()
    equalized: bool = False
    live: Any = field(default=None, repr=False, compare=False)

    def select(self, include: str | Iterable[str] = (), exclude: str | Iterable[str] = ()) -> Plan:
        """Return the plan with the sites that a glob of ``include`` matches (without one: all) and none of ``exclude``
        does; the others become refusals.

        A glob names modules by path, and a module stands for all that is in it; ``*`` stands for dots too. Raises
        RepfuseError for a glob that matches no site.
        """
        include, exclude = as_globs(include), as_globs(exclude)
        check_globs((*include, *exclude), chain.from_iterable(site.names for site in self.sites))
        reasons = [(site, site.left_out(include, exclude)) for site in self.sites]
        kept = tuple(site for site, why in reasons if why is None)
        excluded = (site.without("excluded", why) for site, why in reasons if why is not None)
        return replace(self, sites=kept, refusals=(*self.refusals, *excluded))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "schema": SCHEMA,
            "policy": str(self.policy),
            "sites": [asdict(site) for site in self.sites],
            "refusals": [asdict(refusal) | {"hint": refusal.hint} for refusal in self.refusals],
            "fingerprint": self.fingerprint,
            "arguments": self.arguments,
            "keep_class": self.keep_class,
            "keep_affine": self.keep_affine,
            "matching_borders": list(self.matching_borders),
            **({"measured": [asdict(each) for each in self.measured]} if self.measured else {}),
            **({"equalized": True} if self.equalized else {}),
        }

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """Rebuild a plan from ``to_dict``, or from a document that holds one: a plan file, or what repfuse prints.

        Raises RepfuseError where the data is not a plan of this schema.
        """
        if isinstance(data, dict) and "kind" in data:
            if data["kind"] not in DOCUMENTS or "plan" not in data:
                raise _no_plan(f"it is {_shown(data['kind'])}, which holds no plan")
            data = data["plan"]
        if not isinstance(data, dict) or "schema" not in data:
            raise _no_plan(f"it is {_shown(data)}, without a schema")
        if data["schema"] != SCHEMA:
            raise RepfuseError(
                f"This plan has schema {_shown(data['schema'])}, not {SCHEMA}.",
                "It was written by another version of repfuse.",
                "Make the plan again with this version, or install the version that wrote it.",
            )
        fields = _without(data, "schema")
        if missing := {"matching_borders", "keep_class"} - fields.keys():  # what a plan means hangs on these
            raise _no_plan(f"it has no {min(missing)!r}")
        if "live" in fields:
            raise _no_plan("it has 'live', which does not belong there")
        if isinstance(refusals := fields.get("refusals"), list):
            fields["refusals"] = [_without(refusal, "hint") for refusal in refusals]
        plan: Plan = read_as(Plan, fields)
        plan._check()
        return plan

    def _check(self) -> None:
        """Raise RepfuseError where a plan that was read holds what none of this version does."""
        if unknown := [refusal.code for refusal in self.refusals if refusal.code not in REFUSALS]:
            raise _no_plan(f"{_shown(unknown[0])} is no refusal that this version of repfuse knows")
        if len({site.key for site in self.sites}) < len(self.sites):
            raise _no_plan("two of its sites are the same")
        try:
            numbers = _numbers(self.arguments)
        except ValueError as error:
            raise _no_plan(f"arguments: {error}") from error
        if numbers > LARGEST_EXAMPLE:
            raise _no_plan(f"arguments: it has tensors of more than {LARGEST_EXAMPLE:,} numbers")

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


MISTAKES = {  # what pydantic calls them, and we
    "unexpected_keyword_argument": "it does not belong there",
    "missing": "it is missing",
    "json_invalid": "it is nested too deeply",
    "predicate_failed": "it has characters that cannot be shown",
}


def read_as(kind: Any, data: Any, *, strict: bool = True) -> Any:
    """Return data as the type ``kind``. Raises RepfuseError with the first place where it is something else.

    Where it is not ``strict``, numbers may be texts, as "inf" and "nan" are in JSON.
    """
    from pydantic import ValidationError

    try:
        return reader_of(kind).validate_json(json.dumps(data, ensure_ascii=False).encode(), strict=strict)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in wrong["loc"]).lstrip(".")
        said = MISTAKES.get(wrong["type"], wrong["msg"])
        raise _no_plan(f"{place or 'the plan'}: {said}, and it is {_shown(wrong['input'])}") from error
    except UnicodeEncodeError as error:
        raise _no_plan(MISTAKES["predicate_failed"]) from error
    except (TypeError, ValueError, RecursionError) as error:  # it is no JSON
        raise _no_plan(first_line(error)) from error


@cache
def reader_of(kind: Any) -> TypeAdapter[Any]:
    """Return what reads a type: to make it takes longer than to read a plan."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _without(value: Any, name: str) -> Any:
    """Return a mapping without one of its names; anything else as it is."""
    return {key: held for key, held in value.items() if key != name} if isinstance(value, dict) else value


def _no_plan(why: str) -> RepfuseError:
    return RepfuseError("This is not a plan that repfuse wrote.", f"{why}.", AGAIN)


def _shown(value: Any) -> str:
    """Return so much of a value as fits in a message."""
    text = short(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# Which sites are meant: module paths by glob.


ROOT = "(root)"
"""How people name the model itself, whose path is empty."""

_NEAR = 4  # names that are shown where a glob matches none


def above(path: str) -> list[str]:
    """Return the paths of the modules around a module or a tensor, but for the model, which is around all: a, a.b."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def first_match(names: Iterable[str], globs: Iterable[str]) -> str | None:
    """Return the first glob that matches one of the names, where ``*`` stands for dots too."""
    known = list(names)
    return next((glob for glob in globs if any(fnmatchcase(name, glob) for name in known)), None)


def as_globs(globs: str | Iterable[str]) -> tuple[str, ...]:
    """Return one glob or several as several."""
    return (globs,) if isinstance(globs, str) else tuple(globs)


def check_globs(globs: Iterable[str], names: Iterable[str]) -> None:
    """Raise RepfuseError for a glob that matches none of the names."""
    known = dict.fromkeys(names)
    for glob in globs:
        if first_match(known, (glob,)) is None:
            near = get_close_matches(glob, known, _NEAR, cutoff=0.4) or list(known)[:_NEAR]
            said = f"Near are {', '.join(near)}." if near else "There are no sites."
            hint = "`repfuse inspect` lists the sites; * stands for anything, dots too."
            raise RepfuseError(f"No site matches {glob!r}.", said, hint)
