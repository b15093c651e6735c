"""The plan as plain data: what will be rewritten, what will not, and why. It knows no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from repfuse.errors import RepfuseError
from repfuse.refusals import REFUSALS

SCHEMA = 3


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
    name nodes of the graph of the traced ``part``; with them the plan replays on the same model.
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
    part: str = ""


@dataclass(frozen=True)
class Part:
    """One module that was traced as a whole: the model, or what lies within a module that cannot be traced.

    ``path`` is its path, ``fingerprint`` identifies its graph, ``arguments`` describe those that it was traced with.
    ``matching_borders`` are the nodes of layers that pad with what lies beyond the border, as far as that depends on
    the weights; ``shared`` the modules in it that are also used from outside, by their path within it. ``exported``
    says that the graph is torch.export's.
    """

    path: str
    fingerprint: str
    arguments: Any
    matching_borders: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    exported: bool = False


@dataclass(frozen=True)
class Plan:
    """Sites and refusals of one model.

    ``parts`` are the traced graphs that they refer to, ``policy`` is what was to be merged. ``live`` saves ``rewrite``
    a second trace in the same process and is never serialised.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    parts: tuple[Part, ...]
    policy: str
    live: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "schema": SCHEMA,
            "policy": self.policy,
            "parts": [asdict(part) for part in self.parts],
            "sites": [asdict(site) for site in self.sites],
            "refusals": [asdict(refusal) | {"hint": refusal.hint} for refusal in self.refusals],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """Rebuild a plan from ``to_dict``. Raises RepfuseError where the data is not a plan of this schema."""
        try:
            if data["schema"] != SCHEMA:
                raise RepfuseError(
                    f"This plan has schema {data['schema']}, not {SCHEMA}.",
                    "It was written by another version of repfuse.",
                    "Make the plan again with this version, or install the version that wrote it.",
                )
            sites = tuple(_site(entry) for entry in data["sites"])
            refusals = tuple(_refusal(entry) for entry in data["refusals"])
            parts = tuple(_part(entry) for entry in data["parts"])
            return Plan(sites, refusals, parts, str(data["policy"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise RepfuseError(
                "This is not a plan that repfuse wrote.",
                f"{type(error).__name__}: {error}.",
                "Make the plan again from the model.",
            ) from error

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def _site(entry: dict[str, Any]) -> Site:
    fields = dict(entry)
    for name in ("branches", "nodes"):
        fields[name] = tuple(fields[name])
    for name in ("before", "after"):
        fields[name] = Cost(**fields[name])
    return Site(**fields)


def _part(entry: dict[str, Any]) -> Part:
    borders, shared = (tuple(map(str, entry[name])) for name in ("matching_borders", "shared"))
    return Part(
        str(entry["path"]), str(entry["fingerprint"]), entry["arguments"], borders, shared, bool(entry["exported"])
    )


def _refusal(entry: dict[str, Any]) -> Refusal:
    def cost(name: str) -> Cost | None:
        return Cost(**entry[name]) if entry.get(name) else None

    return Refusal(entry["code"], entry["where"], entry["reason"], cost("before"), cost("after"))
