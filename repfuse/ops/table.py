"""What each operator means: a row per operator, whatever its spelling; and what the nodes of a recording mean."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import takewhile
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.geometry import NotAffine
from repfuse.ops import channels, convolution, indexing, products, sums
from repfuse.ops.meaning import Meaning, Passage, Rearranged, Same, Unfusible, inputs_of
from repfuse.ops.spelling import CASTS, DROPOUTS, RESIZING, TURNING, Call, is_data, makes_zeros, spelled, spread
from repfuse.recording.recording import Recording
from repfuse.recording.run import assigned, set_data, unknown

Row = Callable[[Call, Recording], Meaning | None]


def _either(*rows: Row) -> Row:
    """The first of these meanings that there is."""

    def first(call: Call, recording: Recording) -> Meaning | None:
        found = (row(call, recording) for row in rows)
        return next((meaning for meaning in found if meaning is not None), None)

    return first


def _always(code: str, reason: str) -> Row:
    return lambda _call, _recording: Unfusible(code, reason)


def _same(call: Call, _recording: Recording) -> Meaning | None:
    """``y = x``, in inference. Whether a cast changes the dtype, the recording tells the planner."""
    return Same(call.input)


def _item(call: Call, recording: Recording) -> Meaning | None:
    """``x[index]``: a part of a tensor, or one of the values that a node returns."""
    producer = spelled(call.input) if isinstance(call.input, fx.Node) else None
    if producer is not None and producer.operator in channels.PIECES:
        return channels.piece(call, producer, recording)
    if producer is not None and producer.operator in sums.NATIVE_NORMS:
        return sums.normalised_part(call, producer, recording)
    return _either(channels.with_new_axes, indexing.indexed, channels.picked)(call, recording)


def _attribute(call: Call, recording: Recording) -> Meaning | None:
    """``x.data``, and the transposes that are written as attributes."""
    return Same(call.input) if call.get("attribute") == "data" else channels.permuted(call, recording)


_BY_INPUT = _always("input-statistics", "the normalisation uses the statistics of what it is given")
_BY_NUMBER = _always("embedding", "its input says which rows of the table to take")
_ROUNDED = _always("fake-quantised", "the value is rounded as a quantised one would be")

OF_ANY: dict[str, Row] = {
    "matmul": products.product,
    "einsum": products.einsum,
    "addmm": products.biased_product,
    "add": sums.add,
    "sub": partial(sums.add, sign=-1.0),
    "rsub": sums.rsub,
    "mul": sums.mul,
    "lerp": sums.lerp,
    "addcmul": sums.addcmul,
    "stack": sums.stack,
    **dict.fromkeys(("cat", "hstack"), channels.cat),
    "getitem": _item,
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _BY_INPUT),
    "embedding": _BY_NUMBER,
    **{f"fake_quantize_per_{what}_affine": _ROUNDED for what in ("tensor", "channel")},
}
"""Operators whose first argument may be something else than a tensor that depends on the input of the model."""

ROWS: dict[str, Row] = {
    **OF_ANY,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution.convolution),
    **{f"conv_transpose{ndim}d": convolution.transposed for ndim in (1, 2, 3)},
    "linear": products.linear,
    "tensordot": products.tensordot,
    **dict.fromkeys(("batch_norm", "instance_norm"), sums.norm),
    **dict.fromkeys(sums.NATIVE_NORMS, sums.native_batch_norm),
    "div": sums.div,
    "neg": sums.neg,
    "sum": sums.total,
    "mean": _either(sums.total, channels.mean),
    **dict.fromkeys(("pad", "constant_pad_nd"), indexing.filled_pad),
    "assigned": indexing.assigned,
    **{f"reflection_pad{ndim}d": partial(convolution.pad, mode="reflect") for ndim in (1, 2, 3)},
    **{f"replication_pad{ndim}d": partial(convolution.pad, mode="replicate") for ndim in (1, 2, 3)},
    **{f"avg_pool{ndim}d": partial(convolution.average_pool, ndim=ndim) for ndim in (1, 2, 3)},
    "index": indexing.indexed,
    **dict.fromkeys(("slice", "narrow", "index_select", "repeat_interleave"), indexing.along),
    **dict.fromkeys(("flip", "roll"), channels.reordered),
    "select": channels.selected,
    **dict.fromkeys(channels.PIECES, channels.pieces),
    "channel_shuffle": channels.shuffle,
    "pixel_unshuffle": channels.unshuffled,
    "pixel_shuffle": channels.shuffled,
    **dict.fromkeys(RESIZING, _either(convolution.enlarged, channels.resized)),
    **dict.fromkeys(channels.VIEWS, _either(channels.reshaped, channels.viewed)),
    **dict.fromkeys(("view_as", "unsqueeze"), channels.viewed),
    "squeeze": channels.squeezed,
    **dict.fromkeys(TURNING, _either(channels.passing, channels.permuted)),
    **{f"adaptive_avg_pool{ndim}d": partial(channels.adaptive_pool, ndim=ndim) for ndim in (1, 2, 3)},
    **dict.fromkeys(("clone", "contiguous"), _either(channels.passing, _same)),
    **dict.fromkeys(("detach", "positive", "to", "cuda", *CASTS), _same),
    "type": lambda call, _recording: None if call.get("dtype") is None else Same(call.input),  # else it is a string
    "getattr": _attribute,
    **dict.fromkeys(
        DROPOUTS, lambda call, _recording: Same(call.input) if call.get("training", True) is False else None
    ),
}


def meaning_of(node: fx.Node, recording: Recording) -> Meaning | None:
    """Return what ``node`` means to the planner, or None where it is opaque, or depends on parameters alone."""
    call = spelled(node)
    if call is None or call.operator not in ROWS or recording.constants.name_of(node) is not None:
        return None
    usable = call.operator in OF_ANY or is_data(call.input, recording)
    return ROWS[call.operator](call, recording) if usable else None


class Meanings(dict[fx.Node, Meaning | None]):
    """The meaning of each node of a recording, None where it is opaque; ``refuse`` records what looks fusible and is
    not.

    ``dead`` is code that reads no values and changes nothing. ``sizes`` measure tensors for operations that are known.
    ``helpers`` are needed by their readers alone and go with them: parameters, weights computed from them, sizes, lists
    of chunks. Helpers that write are in ``written``, with the values that lie in the memory that they change: these
    have readers too.
    """

    def __init__(self, recording: Recording, refuse: Callable[[NotAffine, fx.Node], None]) -> None:
        self.recording = recording
        self.refuse = refuse
        self.dead = self._find_dead()
        super().__init__((x, None if x in self.dead else meaning_of(x, recording)) for x in recording.nodes)
        self._find_repeated()
        turned = products.between_turns(self, recording)
        self._followed = {node for each in turned for node in (each.last, *each.inner)}
        for each in turned:
            self.update({each.last: each.meaning, **dict.fromkeys(each.inner, Passage())})
        for node in recording.nodes:
            self._drop_unusable(node)
            self._drop_idle(node)
        for each in turned:
            if any(self[node] is None for node in each.inner):
                self[each.last] = None
        self.sizes = set[fx.Node]()
        for node in reversed(recording.nodes):
            known = (user in self.sizes or user in self.dead or self.get(user) is not None for user in node.users)
            if self._measures(node) and all(known):
                self.sizes.add(node)
        plain = (x for x in recording.nodes if x.op == "get_attr" or x.target is getattr or makes_zeros(x))
        constants = {*plain, *filter(recording.constants.is_constant, recording.nodes)}
        idle = {x for x in recording.nodes if isinstance(self[x], Passage) or self._measures(x) or spread(x, recording)}
        self.helpers = idle | constants
        memory = recording.memory
        self.written = {node: frozenset(memory.members(node)) for node in constants if memory.writes(node)}

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the node whose value ``node`` passes on unchanged."""
        while isinstance(meaning := self.get(node), Same):
            node = meaning.input
        return node

    def before_phases(self, nodes: Collection[fx.Node]) -> list[fx.Node]:
        """Return the nodes of a region, in order, among which its layer has to be: those before any depth to space."""
        ordered = sorted(nodes, key=self.recording.order.__getitem__)
        return list(takewhile(lambda node: not getattr(self[node], "phases", ()), ordered))

    def reads_nothing(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` looks at no numbers of ``node``: it takes sizes alone, which others have, too, or for
        operations that are known.
        """
        if user in self.dead or user in self.sizes:
            return True
        return node not in self.recording.sized and (self._measures(user) or channels.only_measures(user, node))

    def readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield who reads the value of ``node``, through what only hands it on."""
        for user in node.users:
            if isinstance(self.get(user), Passage):
                yield from self.readers(user)
            elif not self.reads_nothing(user, node):
                yield user

    def _find_repeated(self) -> None:
        """Let what is computed again be what was before: ``conv3(relu(x)) + conv1(relu(x))`` has one source."""
        recording, first = self.recording, dict[tuple[Any, ...], fx.Node]()
        known = dict[fx.Node, fx.Node]()

        def name(x: fx.Node) -> str:
            return f"<{known.get(x, self.origin(x)).name}>"

        for node in recording.nodes:
            if not self._may_be_repeated(node):
                continue
            key = node.op, node.target, repr(map_arg((node.args, node.kwargs), name))
            before = first.setdefault(key, node)
            if before is node or not self._is_unchanged(before, node):
                continue
            known[node] = before
            if node in recording.shape_of:
                self[node] = Same(before)

    def _may_be_repeated(self, node: fx.Node) -> bool:
        """Whether a node is a size, or computes or moves numbers and is no layer, which is merged instead."""
        recording, memory = self.recording, self.recording.memory
        if node in recording.run.size_of:
            return True
        plain = node in recording.shape_of and node.op in ("call_function", "call_method")
        if not plain or node.target in (unknown, set_data, assigned) or node in recording.run.random:
            return False
        moves = self[node] is None or isinstance(self[node], Rearranged | Selected | Joined)
        lasts = not memory.writes(node) and not memory.writers(node) and node not in recording.escaping
        return moves and lasts and recording.mark_of(node) is None and not recording.constants.is_constant(node)

    def _is_unchanged(self, before: fx.Node, node: fx.Node) -> bool:
        """Whether what was computed ``before`` comes out again at ``node``: its inputs were not written in between."""
        recording = self.recording
        written = (recording.memory.written_between(x, before, node) for x in before.all_input_nodes)
        return not any(written) and recording.between(before, node) is None

    def _find_dead(self) -> set[fx.Node]:
        """Return what nothing needs: sizes and dtypes, parts of lists, parameters that were read in vain."""
        dead, recording = set[fx.Node](), self.recording
        for node in reversed(recording.nodes):
            if not dead.issuperset(node.users) or recording.memory.writes(node) or node in recording.escaping:
                continue
            getitem = getattr(node.target, "__name__", "") == "getitem"
            part = getitem and node.all_input_nodes[0] not in recording.shape_of
            useless = part or self._measures(node) or recording.constants.is_constant(node)
            if useless and node.op != "placeholder":
                dead.add(node)
        return dead

    def _measures(self, node: fx.Node) -> bool:
        """Whether a node is a size of a tensor, a number computed from sizes, or the dtype or device of a tensor."""
        shape_of = self.recording.shape_of
        return node in self.recording.run.size_of or (node.target is getattr and node not in shape_of)

    def _drop_unusable(self, node: fx.Node) -> None:
        """Make a node opaque that only looks like an affine map, or of which one cannot be certain."""
        meaning, recording = self[node], self.recording
        if meaning is None:
            return
        tensors = (node, *inputs_of(meaning))
        followed = isinstance(meaning, Rearranged) or node in self._followed  # at other ranks, too
        mark = recording.mark_of(node, any_rank=not followed)
        if isinstance(meaning, Unfusible):
            uncertain = mark if meaning.code == "computed-weight" else None  # then no weight there counts as constant
            self._reject(node, *(uncertain or (meaning.code, meaning.reason)))
        elif mark is not None:
            self._reject(node, *mark)
        elif not recording.foreign.get(node, set()) <= set(inputs_of(meaning)):
            self._reject(node, "changes-with-size", "its weight is another one at other sizes")
        elif isinstance(meaning, Passage):
            return
        elif not recording.shape_of.keys() >= set(tensors):
            self[node] = None  # numbers and sizes, not tensors
        elif len({recording.dtype_of[x] for x in tensors}) > 1:  # ``uint8 * 1.0`` is float
            self._drop_conversion(node)
        elif node in recording.run.writes and recording.memory.seen_later(node):
            self._reject(node, "in-place", "what is overwritten here is read again later")

    def _drop_conversion(self, node: fx.Node) -> None:
        if isinstance(self[node], Through):
            self._reject(node, "autocast", "it converts what it is given, as automatic mixed precision wants it")
        self[node] = None

    def _drop_idle(self, node: fx.Node) -> None:
        """Make a node opaque that rearranges what no map made: nothing could be moved across it."""
        meaning = self[node]
        if isinstance(meaning, Rearranged):
            made = self[self.origin(meaning.input)]
            if not isinstance(made, Through | Scaled | Sum | Rearranged):
                self[node] = None

    def _reject(self, node: fx.Node, code: str, reason: str) -> None:
        """Make a node opaque; a refusal where it is a normalisation, or a layer or one is next to it, or reads what it
        reads.
        """
        meaning = self[node]
        dynamic = isinstance(meaning, Unfusible) and meaning.code == "computed-weight"
        layers_alone = code in ("broadcast", "embedding", "input-statistics")
        kinds = (Through, Scaled) if layers_alone else (Through, Scaled, Sum)
        beside = (operand for user in node.users for operand in user.all_input_nodes if operand is not node)
        near = any(isinstance(self.get(x), kinds) for x in (*node.all_input_nodes, *node.users, *beside))
        if dynamic or (near and not isinstance(meaning, Rearranged)) or sums.normalises(node, self.recording):
            self.refuse(NotAffine(code, reason), node)
        self[node] = None
