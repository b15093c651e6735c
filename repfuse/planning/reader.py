"""node -> terms: what a node computes, given what its operands do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, product

from torch import fx
from torch.utils._pytree import tree_leaves

from repfuse.algebra.expression import (
    Expression,
    Identity,
    Joined,
    Scaled,
    Selected,
    Sum,
    Through,
    joined,
    laid_anyhow,
    layers,
    of_channels_alone,
    of_whole,
    relaid,
    selected,
    through,
)
from repfuse.algebra.geometry import Ints, NotAffine
from repfuse.algebra.layers import Channelwise, Convolution, Factor, Layer, Normalisation, Offset, mixes
from repfuse.ops.meaning import Rearranged, Same, convolves, inputs_of, terms_of
from repfuse.ops.table import Meanings
from repfuse.planning.region import Group, Term


class Ends(NotAffine):
    """A region ends here, where nobody would expect it to go on."""

    def __init__(self, reason: str) -> None:
        super().__init__("channel-mismatch", reason)


Reach = Callable[[fx.Node], tuple[Term, ...]]
Bordered = Callable[[Expression, Layer, fx.Node, fx.Node], Expression]


class BranchReader:
    """Reads terms off nodes, given those of their operands.

    ``bordered`` returns what is computed from a source as that which a layer may read, and raises NotAffine where the
    layer pads it with something else than what lies beyond the border; ``composes`` says whether layers in a row may
    become one.
    """

    def __init__(self, meanings: Meanings, bordered: Bordered, composes: bool) -> None:
        self.meanings = meanings
        self.shape_of = meanings.recording.shape_of
        self.bordered = bordered
        self.composes = composes

    def source(self, node: fx.Node) -> Term:
        """Return the value of ``node`` itself as a term: until it meets a layer, its channels are taken for axis 1."""
        shape = self.shape_of[node]
        return Term(node, Identity(shape[1] if len(shape) > 1 else 1, max(len(shape) - 2, 0)), frozenset(), node)

    def terms(self, node: fx.Node, reach: Reach) -> tuple[Term, ...]:  # noqa: PLR0911 - one for each kind
        """Return the terms of ``node``. Raises NotAffine where its operands have to be values of their own."""
        match self.meanings[node]:
            case Through(x, layer):
                return (self._applied(node, self._one(reach(x), node), layer),)
            case Scaled(x, by, axis):
                return tuple(self._rescaled(node, reach(x), by, axis))
            case Rearranged(x) as meaning:
                terms = reach(x)
                if len({term.source for term in terms}) > 1:
                    raise Ends("a sum of maps of several sources")
                return (self._rearranged(node, self._one(terms, node), meaning),)
            case Sum() as combined:
                return self._combined(node, [(reach(term.input), term) for term in terms_of(combined)])
            case Selected(x, indices, axis):
                _check_as_they_were(reach(x))
                _check_not_joined(reach(x))
                along = [self._along(axis, term) for term in reach(x)]
                _check_one_source_or_convolved(along)
                return tuple(_grown(term, node, selected(term.expression, indices)) for term in along)
            case Joined(inputs, axis):
                _check_as_they_were(term for x in inputs for term in reach(x))
                parts = [self._one(reach(x), node) for x in inputs]
                if len({part.source for part in parts}) > 1 and self._is_only_scaled(node):
                    return tuple(self._beside(node, parts, axis))
                return (self._stacked(node, parts, axis),)
            case Same(x):
                terms = reach(x)
                return tuple(
                    term._replace(nodes=term.nodes | {node}, top=node if len(terms) == 1 else term.top)
                    for term in terms
                )
            case meaning:
                raise AssertionError(f"{meaning} is no operation on terms")

    def _one(self, terms: Sequence[Term], node: fx.Node) -> Term:
        """Return terms as one. Raises NotAffine where they are not one map of one source."""
        if len(terms) == 1:
            return terms[0]
        group = Group(tuple(_agreeing(self._of_one_source(terms, node), self.shape_of)))
        return Term(group.source, group.expression, group.nodes, node)

    def _applied(self, node: fx.Node, term: Term, layer: Layer) -> Term:
        geometry = layer.geometry
        if term.phases:
            return self._applied_to_phases(node, term, layer)
        if term.axis is not None:
            inside = of_channels_alone(term.expression, geometry.ndim)
            if inside is None or term.picks or term.axis != (1 if geometry.ndim else len(self.shape_of[node]) - 1):
                raise Ends("the channels are elsewhere")
            term = term._replace(expression=inside, axis=None)
        inner = relaid(term.expression, geometry.in_channels, geometry.ndim)
        expression = through(inner, layer)
        bordered = self.bordered(inner, layer, term.source, node)
        self._check_policy(inner, layer)
        return _grown(term, node, expression if bordered is inner else through(bordered, layer))

    def _check_policy(self, inner: Expression, layer: Layer) -> None:
        if not self.composes and mixes(layer) and any(map(mixes, layers(inner))):
            raise NotAffine("policy", "layers in a row, which are to stay that")

    def _applied_to_phases(self, node: fx.Node, term: Term, layer: Layer) -> Term:
        """Apply a layer of single pixels to channels of which several became one: to each phase of these alone.

        With S for depth to space, ``W S(x) = S((W (x) I) x)``: the layer acts on all pixels alike.
        """
        if not isinstance(layer, Convolution) or not layer.geometry.is_pointwise or not layer.geometry.ndim:
            raise Ends("a layer of more than single pixels, after depth to space")
        if not all(map(self._is_for_any_channels, term.nodes)):
            raise Ends("another number of channels would not do there")
        self._check_policy(term.expression, layer)
        place = {pair: index for index, pair in enumerate(zip(term.phases, term.picks, strict=True))}
        count, inputs = len(set(term.phases)), layer.geometry.in_channels
        parts = tuple(
            through(selected(term.expression, tuple(place[phase, pick] for pick in range(inputs))), layer)
            for phase in range(count)
        )
        in_turn = term.phases[:count]  # those of the first channel: alike for all
        picks, phases = zip(*product(range(layer.geometry.out_channels), in_turn), strict=True)
        order = tuple(phase * layer.geometry.out_channels + pick for pick, phase in zip(picks, phases, strict=True))
        expression = selected(joined(parts), order)
        return _grown(term, node, expression)._replace(picks=picks, phases=phases)

    def _is_for_any_channels(self, node: fx.Node) -> bool:
        """Whether what stays of a region, and only puts values elsewhere, does so for another number of channels."""
        match self.meanings[node]:
            case Rearranged() as meaning:
                return bool(meaning.phases)
            case Same():
                leaves = tree_leaves((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, slice))
                return not any(type(leaf) in (int, slice) for leaf in leaves)
            case _:
                return True

    def _rescaled(self, node: fx.Node, terms: Sequence[Term], by: Channelwise, axis: int | None) -> Iterator[Term]:
        """Scale every term, and shift one: ``s (a + b) + t = (s a + t) + s b``; of joined ones, each by its own."""
        _check_one_source_or_convolved(terms)
        terms = [self._along(axis, term) for term in terms]
        shifted = next((index for index, term in enumerate(terms) if term.convolves), 0)
        for index, term in enumerate(terms):
            own = by if index == shifted or term.span else unshifted(by)
            picks = tuple(range(*term.span)) if term.span else term.picks
            scaled = term.expression if own is None else Scaled(term.expression, own, picks=picks)
            yield _grown(term, node, scaled)

    def _rearranged(self, node: fx.Node, term: Term, meaning: Rearranged) -> Term:
        """Take a map to where the node has its channels; what scales and shifts these goes on merging with it.

        Where it is one of channels alone, so do layers: ``P (X W^T + 1 b^T) = (P X) W^T + 1 b^T``.
        """
        x, made = meaning.input, self.meanings[self.meanings.origin(meaning.input)]
        at = term.axis
        if at is None and any(layers(term.expression)):
            at = 1 if term.expression.geometry.ndim else len(self.shape_of[x]) - 1
        elif at is None and isinstance(made, Scaled):
            at = made.axis
        axis = None if at is None else dict(meaning.moves).get(at)
        if axis is None or term.of_source is not None:
            raise Ends("the channels are elsewhere")
        left = (term.left if term.axis is not None else self.meanings.origin(x)) if meaning.view else None
        grown = _grown(term, node, term.expression)._replace(axis=axis, left=left)
        shapes = self.meanings.recording.all_shapes  # for whatever the network takes
        if left is not None and shapes(node) == shapes(left):
            undone = term.undone | {each for each in grown.nodes if isinstance(self.meanings[each], Rearranged)}
            return grown._replace(axis=None, left=None, undone=undone)
        if not meaning.channels:
            return grown
        if not term.picks:
            return grown._replace(picks=meaning.channels, phases=meaning.phases)
        picks, phases = tuple(meaning.channels[pick] for pick in term.picks), Ints()
        if term.phases and meaning.phases:
            count = 1 + max(meaning.phases)
            pairs = zip(term.phases, term.picks, strict=True)
            phases = tuple(count * phase + meaning.phases[pick] for phase, pick in pairs)
        return grown._replace(picks=picks, phases=phases)

    def _combined(
        self, node: fx.Node, operands: Sequence[tuple[tuple[Term, ...], Scaled[fx.Node]]]
    ) -> tuple[Term, ...]:
        _check_as_they_were(term for terms, _ in operands for term in terms)
        if len(operands) > 1:
            _check_not_joined(term for terms, _ in operands for term in terms)
        alone = len(operands) == 1 and len(operands[0][0]) == 1
        terms = [
            along._replace(
                expression=along.expression if scaled.by == Factor(1.0) else Scaled(along.expression, scaled.by),
                nodes=along.nodes | {node},
                top=node if alone else along.top,
            )
            for terms, scaled in operands
            for along in (self._along(scaled.axis, term) for term in terms)
        ]
        return tuple(_agreeing(terms, self.shape_of))

    def _stacked(self, node: fx.Node, parts: Sequence[Term], axis: int | None) -> Term:
        along = [self._along(axis, part) for part in self._of_one_source(parts, node)]
        nodes = frozenset(chain.from_iterable(part.nodes for part in parts)) | {node}
        return Term(along[0].source, joined(tuple(part.expression for part in along)), nodes, node)

    def _beside(self, node: fx.Node, parts: Sequence[Term], axis: int | None) -> Iterator[Term]:
        """Yield maps of several sources that ``node`` joins, each for its own channels, on which it goes on merging:
        ``s [a, b] + t = [s_a a + t_a, s_b b + t_b]``. Raises NotAffine where one of them has nothing to merge into.
        """
        if not all(part.convolves for part in parts):
            raise _several_sources()
        start = 0
        for part in (self._along(axis, part) for part in parts):
            stop = start + part.expression.geometry.out_channels
            yield _grown(part, node, part.expression)._replace(span=(start, stop))
            start = stop

    def _is_only_scaled(self, node: fx.Node) -> bool:
        """Whether all that reads a value scales and shifts it, for what is no layer that could take that in."""
        meanings, scaled = self.meanings, False
        while True:
            readers = list(meanings.readers(node))
            meaning = meanings.get(readers[0]) if len(readers) == 1 else None
            times = isinstance(meaning, Scaled) or (isinstance(meaning, Sum) and len(meaning.inputs) == 1)
            if not (times or isinstance(meaning, Same)):
                return scaled and not any(convolves(meanings.get(reader)) for reader in readers)
            node, scaled = readers[0], scaled or times

    def _of_one_source(self, terms: Sequence[Term], node: fx.Node) -> list[Term]:
        """Return terms, which ``node`` reads, as those of one tensor: where their sources are parts of one, of that.

        Raises NotAffine where they are not.
        """
        if len({term.source for term in terms}) == 1:
            return list(terms)
        by_source = [{each.source: each for each in self._of_wholes(term, node)} for term in terms]
        common = next((source for source in by_source[0] if all(source in other for other in by_source)), None)
        if common is None:
            raise _several_sources()
        return [each[common] for each in by_source]

    def _of_wholes(self, term: Term, node: fx.Node) -> Iterator[Term]:
        """Yield the term, and where its source is some channels of a tensor, the term as one of that, and so on.

        What chooses the channels is not replaced: others read it too.
        """
        yield term
        part = self.meanings.get(term.source)
        if not isinstance(part, Selected) or part.axis is None or term.axis is not None:
            return
        origin = self.meanings.origin
        nodes = {*term.nodes, node}
        readers = (each for each in nodes if term.source in map(origin, inputs_of(self.meanings[each])))
        links = [(part.input, term.source), *((term.source, reader) for reader in readers)]
        if any(self.meanings.recording.between(*link) is not None for link in links):
            return
        try:
            inner = self._along(part.axis, term).expression
            whole = of_whole(inner, self.shape_of[part.input][part.axis], part.indices)
        except NotAffine:
            return
        yield from self._of_wholes(term._replace(source=self.meanings.origin(part.input), expression=whole), node)

    def _along(self, axis: int | None, term: Term) -> Term:
        """Return the term as one whose channels lie along ``axis``. Raises NotAffine where they do not."""
        if term.axis is not None and axis not in (None, term.axis):
            raise Ends("the channels are elsewhere")
        if axis is None or term.axis is not None:
            return term
        shape = self.shape_of[term.source]
        last = axis == len(shape) - 1 and axis > 1
        wanted = 0 if last else max(len(shape) - 2, 0)
        if laid_anyhow(term.expression):
            return term._replace(expression=relaid(term.expression, shape[axis], wanted))
        if term.expression.geometry.ndim != wanted:
            raise NotAffine("channel-mismatch", "the operation before it has its channels along another axis")
        return term


def unshifted(by: Channelwise) -> Channelwise | None:
    """Return the scale of ``by`` without its shift; None where nothing is left."""
    match by:
        case Normalisation():
            return replace(by, mean=None, bias=None)
        case Offset(_, _, scale):
            return None if scale == 1 else Factor(scale)
        case Factor():
            return by


def _grown(term: Term, node: fx.Node, expression: Expression) -> Term:
    return term._replace(expression=expression, nodes=term.nodes | {node}, top=node)


def _agreeing(terms: Sequence[Term], shape_of: dict[fx.Node, tuple[int, ...]]) -> list[Term]:
    """Let the terms that are numbers times or plus their source have their channels where the others have them."""
    ndim = next((term.expression.geometry.ndim for term in terms if not laid_anyhow(term.expression)), None)
    if ndim is None:
        return list(terms)
    axis = 1 if ndim else -1
    return [
        term._replace(expression=relaid(term.expression, shape_of[term.source][axis], ndim))
        if not term.expression.convolves and (len(shape_of[term.source]) == ndim + 2 or not ndim)
        else term
        for term in terms
    ]


def _check_as_they_were(terms: Iterable[Term]) -> None:
    if any(term.axis is not None for term in terms):
        raise Ends("a branch has its rows elsewhere")


def _check_not_joined(terms: Iterable[Term]) -> None:
    if any(term.span for term in terms):
        raise _several_sources()


def _several_sources() -> NotAffine:
    return NotAffine("several-sources", "what it reads joins maps of several sources")


def _check_one_source_or_convolved(terms: Sequence[Term]) -> None:
    if len({term.source for term in terms}) > 1 and not all(term.convolves for term in terms):
        raise _several_sources()
