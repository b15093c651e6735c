"""What probing found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repfuse.jsonready import json_ready

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
class SecondOpinion:
    """Every site, probed."""

    sites: tuple[SiteProbe, ...]

    @property
    def passed(self) -> bool:
        """Whether every site holds."""
        return all(site.passed for site in self.sites)

    @property
    def error(self) -> float | None:
        """The largest relative error."""
        return max((site.error for site in self.sites if site.error is not None), default=None)

    @property
    def reason(self) -> str:
        """What decided, where it did not pass."""
        return next((f"{site.path}: {site.reason}" for site in self.sites if not site.passed), "")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        facts = dict(json_ready({"passed": self.passed, "error": self.error, "reason": self.reason}))
        return facts | {"sites": [site.to_dict() for site in self.sites]}
