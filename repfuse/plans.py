"""The plan as plain data: what will be rewritten, what will not, and why. It knows no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

from repfuse.globs import ROOT, as_globs, check_globs, first_match, names_of
from repfuse.refusals import REFUSALS

SCHEMA = 5
AGAIN = "Make the plan again from this model."  # what to do with a plan that does not fit

Key = tuple[str, str, frozenset[str]]
"""The source, output and nodes of a site."""


@dataclass(frozen=True)
class Cost:
    """What a computation costs at the example's shape, predicted and not measured.

    ``macs`` multiply-accumulates, ``bytes`` read and written (weights, inputs, outputs), ``launches`` kernels
    started, ``parameters`` numbers stored.
    """

    macs: int = 0
    bytes: int = 0
    launches: int = 0
    parameters: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.parameters + other.parameters,
        )


@dataclass(frozen=True)
class Refusal:
    """A place that looked fusible and is not. ``code`` is stable; ``where`` is a module path or a graph node."""

    code: str
    where: str
    reason: str
    before: Cost | None = None
    after: Cost | None = None

    @property
    def hint(self) -> str:
        """What the user can do about a refusal of this kind."""
        return REFUSALS[self.code].hint


@dataclass(frozen=True)
class Site:
    """One region that becomes one convolution.

    ``path`` is where the fused convolution lives afterwards, ``owner`` the smallest module that holds the region,
    ``form`` how the owner is rewritten: ``fold`` (new weights in a convolution that was there), ``swap`` (in the place
    of one of several modules in a row), ``chain`` (stock modules in a row) or ``graph`` (a GraphModule of that block).
    ``branches`` describes each merged branch, ``kernel`` the fused convolution. ``source``, ``output`` and ``nodes``
    name operations by the call of a module that made them, ``stages.0.conv/conv2d``; with them the plan replays on the
    same model.
    """

    path: str
    owner: str
    form: str
    branches: tuple[str, ...]
    kernel: str
    source: str
    output: str
    nodes: tuple[str, ...]
    before: Cost
    after: Cost

    @property
    def key(self) -> Key:
        """What identifies the site in the model: the rest follows from it."""
        return self.source, self.output, frozenset(self.nodes)

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that the site goes by: its own, and those of the modules around it, the model apart."""
        return tuple(dict.fromkeys((*names_of(self.path), *(names_of(self.owner) if self.owner else ()))))

    def left_out(self, include: Sequence[str], exclude: Sequence[str]) -> str | None:
        """Return why these globs leave the site out, or None."""
        if (glob := first_match(self.names, exclude)) is not None:
            return f"it is left out by {glob!r}"
        if include and first_match(self.names, include) is None:
            return f"it is not among {', '.join(map(repr, include))}"
        return None

    def excluded(self, why: str) -> Refusal:
        """Return the refusal that says that the user leaves the site out."""
        return self.without("excluded", why)

    def without(self, code: str, why: str) -> Refusal:
        """Return the refusal that says that the site is not merged."""
        return Refusal(code, self.path or ROOT, why, self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data: what people read first, then what the plan needs to replay."""
        data = asdict(self)
        return {name: data.pop(name) for name in ("path", "branches", "kernel", "before", "after")} | data


@dataclass(frozen=True)
class Plan:
    """Sites and refusals of one model.

    ``policy`` is what was to be merged. ``fingerprint`` identifies the modules that the sites refer to, ``arguments``
    describe what it was made with. ``matching_borders`` are the layers that pad with what lies beyond the border, as
    far as that depends on the weights. ``keep_class`` says that the outermost module gets no new forward. ``live``
    saves ``rewrite`` a second recording in the same process and is never serialised.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    policy: str
    fingerprint: str
    arguments: Any
    matching_borders: tuple[str, ...] = ()
    keep_class: bool = False
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
        excluded = (site.excluded(why) for site, why in reasons if why is not None)
        return replace(self, sites=kept, refusals=(*self.refusals, *excluded))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "schema": SCHEMA,
            "policy": self.policy,
            "sites": [site.to_dict() for site in self.sites],
            "refusals": [asdict(refusal) | {"hint": refusal.hint} for refusal in self.refusals],
            "fingerprint": self.fingerprint,
            "arguments": self.arguments,
            "keep_class": self.keep_class,
            "matching_borders": list(self.matching_borders),
        }

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """Rebuild a plan from ``to_dict``, or from a document that holds one: a plan file, or what repfuse prints.

        Raises RepfuseError where the data is not a plan of this schema.
        """
        from repfuse.plan_data import read_plan  # it reads what this module defines

        return read_plan(data)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)
