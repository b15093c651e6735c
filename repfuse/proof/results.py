"""What a proof found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repfuse.jsonready import json_ready
from repfuse.verifying.results import Comparison


@dataclass(frozen=True)
class SiteProof:
    """One site against the operations that it replaces, in float64, on small inputs of several sizes."""

    path: str
    comparison: Comparison

    @property
    def passed(self) -> bool:
        """Whether the site computes what it replaces."""
        return self.comparison.passed

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, without the trials."""
        comparison = self.comparison
        facts = {
            "path": self.path,
            "passed": self.passed,
            "error": comparison.error,
            "trials": len(comparison.compared),
        }
        return dict(json_ready(facts))


@dataclass(frozen=True)
class Proof:
    """Every site, the whole network, and the names of what would be written and is not what was proven, rounded."""

    sites: tuple[SiteProof, ...]
    network: Comparison
    unproven: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every part holds."""
        return self.network.passed and not self.unproven and all(site.passed for site in self.sites)

    @property
    def error(self) -> float | None:
        """The largest relative error of the network and of any site."""
        errors = [part.error for part in (self.network, *(site.comparison for site in self.sites))]
        return max((error for error in errors if error is not None), default=None)

    @property
    def reason(self) -> str:
        """One sentence: what decided."""
        for site in self.sites:
            if not site.passed:
                return f"{site.path}: {site.comparison.reason}"
        if self.unproven:
            return f"What would be written is not what was proven: {', '.join(self.unproven[:3])}."
        return self.network.reason

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        facts = {"passed": self.passed, "error": self.error, "reason": self.reason, "unproven": self.unproven}
        sites = [site.to_dict() for site in self.sites]
        return dict(json_ready(facts)) | {"sites": sites, "network": self.network.to_dict()}
