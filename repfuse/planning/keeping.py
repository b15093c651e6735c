"""Which of the places in a network a plan still holds: whoever edits a plan may drop sites, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from repfuse.errors import RepfuseError
from repfuse.globs import ROOT
from repfuse.placing.edits import Candidate, owner_of, place_of
from repfuse.planning.planner import Planner
from repfuse.plans import AGAIN, Key, Site


def kept(planner: Planner, sites: list[Site]) -> list[Candidate]:
    """Return the candidates that a plan with these sites still holds. Raises RepfuseError where it holds others.

    A plan names a site once; in the other calls of its owner it stands at the same place. Several sites of one sum
    stand and fall together: each is written as a part of it.
    """
    wanted = {site.key for site in sites}
    known = {key for candidate in planner.candidates for key in _keys(planner, candidate)}
    if unknown := [site for site in sites if site.key not in known]:
        raise other_sites(unknown)
    for candidate in planner.candidates:
        if 0 < len(_keys(planner, candidate) & wanted) < len(candidate.groups):
            raise _half_a_sum(planner, candidate, wanted)
    places = {_place(planner, candidate) for candidate in planner.candidates if _keys(planner, candidate) <= wanted}
    return [candidate for candidate in planner.candidates if _place(planner, candidate) in places]


def other_sites(sites: Sequence[Site]) -> RepfuseError:
    """Return the error for sites of a plan that the model does not have."""
    return RepfuseError(
        f"The plan names {len(sites)} sites that this model does not have, such as {sites[0].path or ROOT}.",
        "The model is another one, or the plan was edited by more than dropping sites.",
        AGAIN,
    )


def _half_a_sum(planner: Planner, candidate: Candidate, wanted: set[Key]) -> RepfuseError:
    kept, _, _ = next(iter(_keys(planner, candidate) & wanted))
    return RepfuseError(
        f"The plan holds only some of the sites of one sum, {planner.where(candidate.region.root)}.",
        f"Several convolutions are written there, one for each tensor that the sum reads; that of {kept!r} is kept.",
        "Keep all sites with this output, or leave all of them out.",
    )


def _keys(planner: Planner, candidate: Candidate) -> set[Key]:
    names = planner.recording.names
    root = names[candidate.region.root]
    return {(names[group.source], root, frozenset(names[node] for node in group.nodes)) for group in candidate.groups}


def _place(planner: Planner, candidate: Candidate) -> tuple[str, tuple[int, ...]]:
    region = candidate.region
    return owner_of(planner.recording, region).path, place_of(planner.recording, region)
