"""Normalisations that stay: each is a refusal by its own name, with what stands in the way beside it."""

from __future__ import annotations

from torch import fx

from repfuse.algebra.geometry import NotAffine
from repfuse.ops.meaning import Rearranged, Same, convolves, inputs_of
from repfuse.planning.search import Failure, Search
from repfuse.recording.constants import called


def why_it_stays(norm: fx.Node, search: Search) -> NotAffine:
    """Return why a normalisation merges neither with what makes its input nor with what reads its result."""
    return _before(norm, search) or _behind(norm, search) or _alone(norm)


def _before(norm: fx.Node, search: Search) -> NotAffine | None:
    """Return why the layer that makes what is normalised does not take the normalisation in, if there is one."""
    row, meanings = list(inputs_of(search.meanings.get(norm))), search.meanings
    while row and isinstance(meaning := meanings.get(row[-1]), Same):
        row.append(meaning.input)
    if not row or not any(term.convolves for term in search.terms.get(row[-1], ())):
        return None
    if any(len(search.readers[value]) > 1 or value in search.recording.escaping for value in row):
        return NotAffine("value-escapes", "what it normalises is also read elsewhere")
    return NotAffine("cost", "as one layer with what makes its input, it is predicted to gain nothing")


def _behind(norm: fx.Node, search: Search) -> NotAffine | None:
    """Return why the layer that reads the result does not take the normalisation in, if there is one."""
    row, meanings, readers = [norm], search.meanings, search.readers.get(norm, [])
    while len(readers) == 1 and isinstance(meanings.get(readers[0]), Same | Rearranged):
        row, readers = [*row, readers[0]], search.readers[readers[0]]
    layer = next((reader for reader in readers if convolves(meanings.get(reader))), None)
    if layer is None:
        return None
    mark = search.recording.between(row[-1], layer)
    if mark is not None:
        return NotAffine(*mark)
    if len(readers) > 1 or not search.recording.escaping.isdisjoint(row):
        return NotAffine("value-escapes", "its result is also read elsewhere")
    read = search.read((*row, layer))
    if isinstance(read, Failure):
        return read.error
    return NotAffine("cost", "as one layer with what reads it, it is predicted to gain nothing")


def _alone(norm: fx.Node) -> NotAffine:
    before = called(norm.all_input_nodes[0]) or "what the network is given"
    behind = " and ".join(dict.fromkeys(called(user) or "the output" for user in norm.users))
    return NotAffine("no-convolution", f"it stands between {before} and {behind}, and no layer is next to it")
