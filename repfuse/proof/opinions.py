"""What probing found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repfuse.jsonready import json_ready
from repfuse.probing.evidence import Check
from repfuse.verifying.results import Comparison

EXHAUSTIVE = "exhaustive"


@dataclass(frozen=True)
class SiteProbe:
    """One site: ``error`` is relative, None where it could not be probed; ``reason`` says why it did not pass.

    ``method`` says whether every input channel was probed by itself (``exhaustive``), or mixtures and some channels
    (``sketched``); ``sizes`` are the spatial sizes of the inputs.
    """

    path: str
    error: float | None
    method: str
    sizes: tuple[tuple[int, ...], ...]
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the kernel is that of the operations that it replaces."""
        return self.error is not None and not self.reason

    @property
    def exhaustive(self) -> bool:
        """Whether every input channel was probed by itself."""
        return self.method == EXHAUSTIVE

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return dict(json_ready(self)) | {"passed": self.passed}


@dataclass(frozen=True)
class StandInProof:
    """A module that cannot be traced and became a convolution: proven by probing alone."""

    path: str
    reasons: tuple[Check, ...]
    sizes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SecondOpinion:
    """Every site, probed, with errors up to ``tolerance``.

    ``stand_ins`` are the modules that became convolutions by probing alone, and ``network`` is the whole model with
    these in it against the original, in float64; None where there are none.
    """

    sites: tuple[SiteProbe, ...]
    tolerance: float
    stand_ins: tuple[StandInProof, ...] = ()
    network: Comparison | None = None

    @property
    def passed(self) -> bool:
        """Whether every site holds, and the model with its stand-ins."""
        return all(site.passed for site in self.sites) and (self.network is None or self.network.passed)

    @property
    def error(self) -> float | None:
        """The largest relative error."""
        return max((site.error for site in self.sites if site.error is not None), default=None)

    @property
    def reason(self) -> str:
        """What decided, where it did not pass."""
        if self.network is not None and not self.network.passed:
            paths = ", ".join(one.path for one in self.stand_ins)
            return f"{self.network.reason} That is with convolutions for {paths}; --exclude leaves a module as it is."
        return next((f"{site.path}: {site.reason}" for site in self.sites if not site.passed), "")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        verdict = {"passed": self.passed, "error": self.error, "tolerance": self.tolerance, "reason": self.reason}
        facts = dict(json_ready(verdict))
        stand_ins = {"stand_ins": json_ready(self.stand_ins), "network": self.network and self.network.to_dict()}
        return facts | {"sites": [site.to_dict() for site in self.sites]} | stand_ins
