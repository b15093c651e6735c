"""What a proof found, as plain data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repfuse.checking.results import Comparison, FirstDifference, Level
from repfuse.jsonready import json_ready


@dataclass(frozen=True)
class WeightProof:
    """A stored tensor against the one computed in float64 from the original's and rounded once to its dtype.

    ``wrong`` elements are not equal to that; ``spacings`` is the largest difference in units in the last place, from
    the number in float64: at most a half where all are equal.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    wrong: int
    spacings: float

    @property
    def passed(self) -> bool:
        """Whether every element is equal to the rounding of the last bit."""
        return not self.wrong

    @property
    def reason(self) -> str:
        """One sentence: what differs."""
        return (
            f"{self.name}: {self.wrong} of the stored numbers are not those that were computed, rounded once "
            f"({self.spacings:.2g} units in the last place)."
        )


@dataclass(frozen=True)
class SiteDrift:
    """A site in its stored dtype against the original in float64, on the input that comes closest to its bound.

    ``own`` is the error of the original's operations, ``fused`` that of the fused convolution; ``bound`` the a-priori
    bound of the arithmetic (see ``repfuse.checking.sites``) as a level. ``of_bound`` is the largest quotient of an
    element's error and its own bound.
    """

    trial: str
    dtype: str
    own: Level
    fused: Level
    bound: Level
    of_bound: float

    @property
    def passed(self) -> bool:
        """Whether every element is within its bound."""
        return self.of_bound <= 1


@dataclass(frozen=True)
class SiteProof:
    """One site against the operations that it replaces, on small inputs of several sizes.

    ``comparison`` is the proof: both in float64, with weights that are not rounded yet. ``weights`` compares those with
    what is stored. ``drift`` is None where the stored dtype is float64, or does not run here.
    """

    path: str
    comparison: Comparison
    weights: tuple[WeightProof, ...] = ()
    drift: SiteDrift | None = None

    @property
    def passed(self) -> bool:
        """Whether the site computes what it replaces, its stored weights are right, and its drift is explained."""
        right = self.comparison.passed and all(weight.passed for weight in self.weights)
        return right and (self.drift is None or self.drift.passed)

    @property
    def reason(self) -> str:
        """One sentence: what decided."""
        if not self.comparison.passed:
            return f"{self.path}: {self.comparison.reason}"
        for weight in self.weights:
            if not weight.passed:
                return weight.reason
        if self.drift and not self.drift.passed:
            return (
                f"{self.path}: in {self.drift.dtype}, on {self.drift.trial}, an element is off by "
                f"{self.drift.of_bound:.1e} times what the arithmetic can explain."
            )
        return f"{self.path}: {self.comparison.reason}"

    def departure(self, after: str) -> FirstDifference | None:
        """Return where it departs most and by how much; ``after`` is the path of the site before it."""
        wrong = next((weight for weight in self.weights if not weight.passed), None)
        worst, drift = self.comparison.worst, self.drift
        if not self.comparison.passed and worst:
            allowed = Level(self.comparison.tolerance, self.comparison.tolerance)
            return FirstDifference(self.path, after, worst[0].label, worst[1].relative, allowed)
        if wrong:
            off, half = Level(wrong.spacings, wrong.spacings), Level(0.5, 0.5)
            return FirstDifference(self.path, after, wrong.name, off, half, "difference in units in the last place")
        if drift:
            off, one = Level(drift.of_bound, drift.of_bound), Level(1.0, 1.0)
            return FirstDifference(self.path, after, drift.trial, off, one, "error in units of its bound")
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, without the trials."""
        comparison = self.comparison
        facts = {
            "path": self.path,
            "passed": self.passed,
            "error": comparison.error,
            "tolerance": comparison.tolerance,
            "reason": self.reason,
            "trials": len(comparison.compared),
            "weights": self.weights,
            "drift": self.drift,
        }
        return dict(json_ready(facts))


@dataclass(frozen=True)
class Proof:
    """Every site, the whole network, and the names of what beside the sites is not what the plan makes.

    ``informative`` is False where the network's outputs are 0 or not finite on every input: then only the sites tell.
    """

    sites: tuple[SiteProof, ...]
    network: Comparison
    unproven: tuple[str, ...]
    informative: bool = True

    @property
    def passed(self) -> bool:
        """Whether every part holds."""
        return self.network.passed and not self.unproven and all(site.passed for site in self.sites)

    @property
    def first(self) -> SiteProof | None:
        """The first site that fails."""
        return next((site for site in self.sites if not site.passed), None)

    @property
    def place(self) -> FirstDifference | None:
        """Where that is, with the error there: in float64, or as stored where it is the stored weights that fail."""
        if self.first is None:
            return None
        paths = [site.path for site in self.sites]
        before = paths.index(self.first.path)
        return self.first.departure(paths[before - 1] if before else "")

    @property
    def error(self) -> float | None:
        """The largest relative error in float64 of the network and of any site."""
        errors = [part.error for part in (self.network, *(site.comparison for site in self.sites))]
        return max((error for error in errors if error is not None), default=None)

    @property
    def reason(self) -> str:
        """One sentence: what decided."""
        if self.first:
            return self.first.reason
        if self.unproven:
            return f"The network is not what the plan makes of the original: {', '.join(self.unproven[:3])}."
        return self.network.reason

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        facts = {
            "passed": self.passed,
            "error": self.error,
            "reason": self.reason,
            "unproven": self.unproven,
            "informative": self.informative,
        }
        sites = [site.to_dict() for site in self.sites]
        return dict(json_ready(facts)) | {"sites": sites, "network": self.network.to_dict()}
