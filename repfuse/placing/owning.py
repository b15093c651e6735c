"""Which call of which module gets which candidates: a module is rewritten once, for all its calls, or not at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from torch import fx

from repfuse.algebra.geometry import NotAffine
from repfuse.placing.edits import Candidate, owner_of, place_of
from repfuse.planning.region import Region
from repfuse.recording.calls import Call
from repfuse.recording.recording import Recording

Refuse = Callable[[NotAffine, fx.Node], None]


def once_per_module(
    recording: Recording, candidates: list[Candidate], refuse: Refuse, unlike: set[str]
) -> list[tuple[Call, Candidate]]:
    """Keep one of the calls of each owner: a module that is called often is rewritten once, or not at all.

    Those whose calls differ are added to ``unlike``.
    """
    found: dict[str, dict[Call, dict[tuple[int, ...], Candidate]]] = defaultdict(lambda: defaultdict(dict))
    for candidate in candidates:
        call = owner_of(recording, candidate.region)
        found[call.path][call][place_of(recording, candidate.region)] = candidate
    kept = []
    for path, by_call in found.items():
        calls = recording.calls[path]
        if all(by_call[call].keys() == by_call[calls[0]].keys() for call in calls):
            kept += [(calls[0], candidate) for candidate in by_call[calls[0]].values()]
            continue
        unlike.add(path)
        error = NotAffine("called-differently", f"{path!r} is called {len(calls)} times, not always alike")
        for candidate in (candidate for places in by_call.values() for candidate in places.values()):
            refuse(error, candidate.region.root)
    return kept


def nodes_in(recording: Recording, call: Call, region: Region) -> list[fx.Node]:
    """Return the nodes of the region that the call made; a no-op before it may stand outside."""
    return [node for node in region.nodes if call.start <= recording.order[node] < call.stop]


def whole(recording: Recording, blocks: Mapping[Call, list[Candidate]], refuse: Refuse) -> dict[Call, list[Candidate]]:
    """Refuse what would take apart one call of a module that gets a new body for all its calls."""
    rewritten = {call.path for call in blocks}
    kept: dict[Call, list[Candidate]] = defaultdict(list)
    for call, members in blocks.items():
        for candidate in members:
            nodes = nodes_in(recording, call, candidate.region)
            inner = {each for node in nodes for each in recording.call_of[node].up_to(call)}
            torn = [each.path for each in inner if each.path in rewritten and each not in blocks]
            if torn:
                error = NotAffine("called-differently", f"another call of {torn[0]!r} is merged on its own")
                refuse(error, candidate.region.root)
            else:
                kept[call].append(candidate)
    return kept


def raised(recording: Recording, blocks: Mapping[Call, list[Candidate]]) -> dict[Call, list[Candidate]]:
    """Move what lies in a module that an outer block dissolves up to that block."""
    moved: dict[Call, list[Candidate]] = defaultdict(list)
    for call in sorted(blocks, key=lambda call: (call.start, len(list(call.chain())))):  # the outermost first
        moved[_dissolver(recording, call, moved)] += blocks[call]
    return moved


def _dissolver(recording: Recording, call: Call, outer: Mapping[Call, list[Candidate]]) -> Call:
    for above in reversed(list(call.chain())):
        nodes = (node for candidate in outer.get(above, ()) for node in candidate.region.nodes)
        if any(call in recording.call_of[node].chain() for node in nodes):
            return above
    return call
