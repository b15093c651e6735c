"""The second opinion as lines of the table of checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from repfuse.report.checks_view import Check
from repfuse.report.numbers import error, plural

if TYPE_CHECKING:
    from repfuse.proof.opinions import SecondOpinion, SiteProbe

LEVEL = "probe, float64"


def of_probe(probe: SecondOpinion) -> Iterator[Check]:
    """Yield the sites that were probed channel by channel, the others, and the model with its stand-ins."""
    whole = [site for site in probe.sites if site.exhaustive]
    unread = [site for site in probe.sites if site.error is None]
    rest = [site for site in probe.sites if not site.exhaustive and site.error is not None]
    for sites, how in ((whole, "each channel alone"), (rest, "channels mixed"), (unread, "not readable")):
        if sites:
            yield _sites(sites, how, probe.tolerance)
    if probe.network is not None:
        what = f"the original with {plural(len(probe.stand_ins), 'probed module')} as a convolution"
        places = ", ".join(one.path for one in probe.stand_ins)
        numbers = error(probe.network.error), "", error(probe.network.tolerance)
        yield Check(LEVEL, what, places, *numbers, probe.network.passed)


def _sites(sites: Sequence[SiteProbe], how: str, tolerance: float) -> Check:
    worst = max(sites, key=lambda site: (not site.passed, site.error or 0.0))
    passed = all(site.passed for site in sites)
    what = f"{plural(len(sites), 'site')} by impulses, {how}"
    return Check(LEVEL, what, worst.path, error(worst.error), "", error(tolerance), passed)


def probe_notes(probe: SecondOpinion) -> Iterator[str]:
    """Yield what the table does not say."""
    if not probe.passed:
        yield probe.reason
