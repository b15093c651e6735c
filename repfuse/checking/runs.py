"""Runs of a network in another precision, that leave nothing behind.

The network that is handed in is never called and never changed: some networks cache what they compute, and the copy
that is called carries that away with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import product
from math import prod
from operator import add
from traceback import walk_tb
from typing import Any
from weakref import WeakValueDictionary, ref

import numpy as np
import torch
from torch import Tensor, fx, jit, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from repfuse.checking.inputs import Trial
from repfuse.errors import RepfuseError
from repfuse.memory import is_large, is_streamed
from repfuse.networks import (
    as_before,
    device_of,
    draw_alike,
    join,
    main_dtype,
    named_modules,
    named_tensors,
    own_tensors,
    placed,
    set_eval,
    tensors_of,
    using_threads,
)
from repfuse.recording.copies import changed_copy, like
from repfuse.recording.read_only import WRITING_UNSEEN, OperatorMode, written_into
from repfuse.recording.recorder import TAKING, address
from repfuse.wording import described

# What a network returns, as named tensors.


def leaves(output: Any, name: str = "out") -> dict[str, torch.Tensor]:
    """Return the tensors of ``output`` by readable names: ``out``, ``out[0]``, ``out.logits``.

    Tuples, lists, mappings, named tuples, dataclasses and nested tensors are walked; numbers become tensors; a complex
    tensor gets a last axis for its real and imaginary parts, a sparse one all its numbers; ``None`` is left out. Raises
    RepfuseError for anything else, which could not be compared.
    """
    if output is None:
        return {}
    if isinstance(output, torch.Tensor) and not output.is_nested:
        return {name: _real(output if output.layout is torch.strided else output.to_dense())}
    if isinstance(output, (bool, int, float, complex)):
        exact = {float: torch.float64, complex: torch.complex128}
        return {name: _real(torch.tensor(output, dtype=exact.get(type(output))))}
    found = dict[str, torch.Tensor]()
    for key, value in _parts(output, name):
        is_name = isinstance(key, str) and key.isidentifier()
        found |= leaves(value, f"{name}.{key}" if is_name else f"{name}[{key!r}]")
    return found


def _parts(output: Any, name: str) -> Iterable[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return output.items()
    if is_dataclass(output) and not isinstance(output, type):
        return ((field.name, getattr(output, field.name, None)) for field in fields(output))
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return zip(output._fields, output, strict=True)
    if isinstance(output, (tuple, list, torch.Tensor)):
        return enumerate(output.unbind() if isinstance(output, torch.Tensor) else output)
    raise RepfuseError(
        f"The network returns a {type(output).__name__} ({name}), which cannot be compared.",
        "Outputs are compared as tensors, numbers, and tuples, lists, mappings and dataclasses of them.",
        "Wrap the network in a module that returns tensors.",
    )


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


# Runs in float64 all the way: what a forward computes from its inputs stays wide, also where it fixes a dtype itself.
#
# ``softmax(x.float())`` or ``norm(x.float()).to(torch.bfloat16)`` would round its values. Nothing is merged across such
# a cast, so the comparison may leave it out. A cast of weights alone stays: a rounding of weights belongs to the
# network.


Change = Callable[[str, Tensor], Tensor]
"""Name and tensor -> the tensor, changed: in float64, where it is floating."""

WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
_ALSO = {**WIDE, torch.complex64: torch.complex128}
"""What widened values meet; complex inputs and weights by themselves stay as they are."""


class Widening(TorchFunctionMode):
    """While it is on, no function of torch narrows what is not computed from the tensors of ``network`` alone.

    What such functions meet is widened, exactly; and what forward makes of numbers alone. ``acted`` says whether it
    ever had to.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.resting = self.acted = False
        self._constant = WeakTensorKeyDictionary()
        self._remember(x for _, x in named_tensors(network))
        for table in _tables(network):
            table.told = lambda made: self._remember([made])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.resting:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute: most are numbers, such as a shape
            result = func(*args)
            if isinstance(result, Tensor) and args[0] in self._constant:
                self._constant[result] = True
            return result
        tensors = tensors_of((args, kwargs))
        if all(x in self._constant for x in tensors):
            result = func(*args, **kwargs)
            if not tensors:
                result = self.wide(result)
            self._remember(tensors_of(result))
            return result
        if name in _NARROWING:
            result = func(*args, **kwargs)
            narrow = isinstance(result, Tensor) and result.dtype in WIDE
            self.acted |= narrow
            return args[0].double() if narrow else result
        written = args[:1] if name in _WRITING or (name.endswith("_") and not name.endswith("__")) else ()
        return func(*written, *(self.wide(x) for x in args[len(written) :]), **self.wide(kwargs))

    def wide(self, value: Any) -> Any:
        """Widen the tensors and dtypes in a value."""
        if isinstance(value, Tensor):
            wide = _ALSO.get(value.dtype)
            self.acted |= wide is not None
            return value if wide is None else value.to(wide)
        if isinstance(value, torch.dtype):
            self.acted |= value in WIDE
            return WIDE.get(value, value)
        if isinstance(value, list):  # or torch.fx's kind of it
            return [self.wide(item) for item in value]
        if type(value) is tuple:
            return tuple(self.wide(item) for item in value)
        return {name: self.wide(item) for name, item in value.items()} if isinstance(value, dict) else value

    def _remember(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._constant[tensor] = True


_NARROWING = frozenset({"float", "half", "bfloat16", "type"})
_WRITING = frozenset({"__setitem__", "__set__"})
"""Whose first argument has to stay the object that it is; so has that of every function whose name ends with _."""


class Depthwise(TorchFunctionMode):
    """While it is on, depthwise convolutions of few pixels in float64 are sums over their taps,

    ``y[c, o] = b[c] + sum over k of  w[c, k] x[c, stride o + dilation k - padding]``,

    which is what they are defined as. PyTorch has kernels for them in float32, and takes channel by channel in float64:
    twenty to fifty times as long, most of what a mobile network takes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CONVOLUTIONS and len(args) == 7 and not kwargs and _is_depthwise(*args):
            return _by_taps(*args[:6])
        return func(*args, **(kwargs or {}))


_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})
FEW_PIXELS = 1 << 10  # of one channel: of more, memory is what takes time


def _is_depthwise(  # noqa: PLR0917 - what a convolution is called with
    x: Any, weight: Any, _bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> bool:
    each_alone = groups > 1 and groups == len(weight) == x.shape[1] and weight.shape[1] == 1
    wide = x.dtype is weight.dtype is torch.float64 and x.dim() == weight.dim() and x.is_cpu
    if not (each_alone and wide and x.shape[2:].numel() <= FEW_PIXELS):
        return False
    if not all(isinstance(each, tuple) and len(each) == x.dim() - 2 for each in (stride, padding, dilation)):
        return False
    sizes = zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True)
    return all(n + 2 * p > d * (k - 1) for n, k, p, d in sizes)  # else PyTorch says what is wrong


def _by_taps(  # noqa: PLR0917 - what a convolution is called with
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    kernel, ones = weight.shape[2:], [1] * (weight.dim() - 2)
    if any(padding):
        x = nn.functional.pad(x, [amount for amount in reversed(padding) for _ in range(2)])
    spans = [n - step * (k - 1) for n, step, k in zip(x.shape[2:], dilation, kernel, strict=True)]
    total: Tensor | None = None
    for tap in product(*map(range, kernel)):
        first = [step * at for step, at in zip(dilation, tap, strict=True)]
        window: tuple[Any, ...] = tuple(map(slice, first, map(add, first, spans), stride))
        of_tap: tuple[Any, ...] = (slice(None), 0, *tap)
        seen, factor = x[(..., *window)], weight[of_tap].reshape(-1, *ones)
        total = seen * factor if total is None else total.addcmul_(seen, factor)
    assert total is not None
    return total if bias is None else total.add_(bias.reshape(-1, *ones))


SEED = 0  # of networks that draw random numbers: both draw the same


@dataclass(frozen=True)
class Outcome:
    """What one call gave: its output tensors by name (on the CPU), or else why it failed.

    ``at`` is the path of the innermost module in which it did. ``narrow`` are those that have no float64, and ran in
    their own dtype in a run in float64.
    """

    outputs: dict[str, torch.Tensor]
    error: str = ""
    at: str = ""
    narrow: tuple[str, ...] = ()


Key = tuple[int, str]
"""The position of a trial, and the name of an output."""
Outputs = dict[Key, torch.Tensor]


def by_key(outcomes: Iterable[Outcome]) -> Outputs:
    """Return the outputs of several calls by position and name."""
    return {(position, name): x for position, outcome in enumerate(outcomes) for name, x in outcome.outputs.items()}


def narrow_in(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """Return the modules that had no float64 in any of the outcomes."""
    return tuple(dict.fromkeys(path for outcome in outcomes for path in outcome.narrow))


class Room:
    """Memory for one tensor at a time: to fetch it from the system anew takes ten times as long as to copy numbers.

    What is made here lies in the memory of an array, which goes with the last tensor that looks at it.
    """

    def __init__(self, nbytes: int) -> None:
        self._bytes = torch.empty(nbytes, dtype=torch.uint8).numpy()
        self._taken: Callable[[], object] = lambda: None
        self._arrays: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, steps: Sequence[int] | None = None) -> Tensor:
        """Return an empty tensor, without gaps: in other memory while one lies here, or where there is not enough."""
        nbytes = prod(shape) * dtype.itemsize
        fits = self._taken() is None and nbytes <= len(self._bytes)
        array = self._bytes[:nbytes] if fits else np.empty(nbytes, np.uint8)
        if fits:
            self._taken = ref(array)
        flat = torch.from_numpy(array).view(dtype)
        made = flat.view(tuple(shape)) if steps is None else flat.as_strided(shape, steps)
        self._arrays[address(made)] = array
        return made

    def lent(self, tensor: Tensor) -> bool:
        """Whether a tensor looks at what was made here."""
        return address(tensor) in self._arrays


_room: ContextVar[Room | None] = ContextVar("_room", default=None)
"""Where a tensor is to be made that is read now; None where the system has memory for it."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty tensor, where there is room for what is read now."""
    room = _room.get()
    return torch.empty(shape, dtype=dtype, device=device) if room is None else room.empty(shape, dtype)


def in_float64(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Widen a floating tensor, exactly; leave integers, booleans and complex numbers."""
    return _copy_in(tensor, torch.float64) if tensor.is_floating_point() else tensor.clone()


def as_stored(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor as it is."""
    return _copy_in(tensor, tensor.dtype)


def _copy_in(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy in a dtype, also where the tensor is in it: where there is room for what is read now."""
    room = _room.get()
    if room is None or not tensor.is_contiguous():
        return tensor.to(dtype, copy=True)
    return room.empty(tensor.shape, dtype).copy_(tensor)


@contextmanager
def copied(network: nn.Module, change: Change) -> Iterator[nn.Module]:
    """Lend a copy in eval mode whose tensors are ``change(name, tensor)``; shared ones stay shared.

    Afterwards its tensors are gone, though a recorded network, which refers to itself, would keep them until Python
    looks for such. Raises RepfuseError where the network cannot be copied.
    """
    copy = _copy(network, change)
    try:
        yield copy
    finally:
        for module in copy.modules():
            if not isinstance(module, jit.ScriptModule):
                module._parameters.clear()
                module._buffers.clear()


def readable(network: nn.Module, change: Change, *, whole: bool = False) -> Iterator[nn.Module]:
    """Yield a copy as ``copied`` lends one, to be called and not to be changed; after it perhaps another, to be called
    in its place.

    The tensors of a network that is streamed, and the large ones of any other that is large, are made as they are read,
    and gone when they were used: together, in float64, they would take as much memory as all else. Where a call fails,
    writes into one of these, or gets at what stands in its place, the copy after that has all its tensors; it is the
    only one where it is to be ``whole``.
    """
    if is_streamed(network):
        yield _streamed(network, change)
        return
    if not whole and is_large(network):
        copy, guard = _read_in_part(network, change)
        yield copy
        if not guard.wrong:
            return
    with copied(network, change) as copy:
        yield copy


def _streamed(network: nn.Module, change: Change) -> nn.Module:
    copy = changed_copy(network, lambda _, tensor: tensor, to_run=True)
    made_of = {id(tensor): (tensor, name, tensor.detach()) for name, tensor in named_tensors(copy)}
    read: dict[int, Tensor] = {}
    for module in copy.modules():
        for table in ("_parameters", "_buffers"):
            vars(module)[table] = _Read(vars(module)[table], made_of, change, read)
    set_eval(copy)
    return copy


def _read_in_part(network: nn.Module, change: Change) -> tuple[nn.Module, _Guard]:
    """Return a copy whose large parameters are made as they are read; a number that is none stands in their place."""
    parameters, nan = {id(x) for x in network.parameters()}, dict[torch.dtype, Tensor]()
    plain = ((name, x.detach()) for name, x in named_tensors(network) if id(x) in parameters and x.dtype in _FLOATING)
    large = {name: x for name, x in plain if x.layout is torch.strided and x.is_cpu and x.nbytes >= MUCH}

    def changed(name: str, tensor: Tensor) -> Tensor:
        if name not in large:
            return change(name, tensor)
        return nan.setdefault(tensor.dtype, torch.full((), torch.nan, dtype=tensor.dtype)).expand(tensor.shape)

    copy = _copy(network, changed)
    guard = _Guard(Room(max((x.numel() for x in large.values()), default=0) * 8), nan.values())
    read: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
    made_of = {id(x): (x, name, large[name]) for name, x in named_tensors(copy) if name in large}
    for module in copy.modules():
        if any(id(x) in made_of for x in module._parameters.values()):
            vars(module)["_parameters"] = _Read(module._parameters, made_of, change, read, guard)
    return copy, guard


_FLOATING = {*WIDE, torch.float64}
MUCH = 1 << 18
"""Bytes of a tensor from which on it is worth a while to hold it no longer than it is used."""


class _Guard(OperatorMode):  # type: ignore[no-untyped-call]
    """While it is on, notes whether an operator wrote into what was made in the ``room``, or met what is
    ``forbidden``.
    """

    def __init__(self, room: Room, forbidden: Iterable[Tensor]) -> None:
        super().__init__()
        self.room, self.wrong = room, False
        self._forbidden = set(map(address, forbidden))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.wrong |= not self._forbidden.isdisjoint(map(address, tensors_of((args, kwargs))))
        self.wrong |= any(map(self.room.lent, written_into(func, args, kwargs)))
        return func(*args, **kwargs)

    def knows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of the tensors lies in memory that is to stay as it is."""
        return any(self.room.lent(x) or address(x) in self._forbidden for x in tensors)


class _PastOperators(TorchFunctionMode):
    """While it is on, tells a guard of the functions of torch that exchange numbers or take them away."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _PAST_OPERATORS:
            self._guard.wrong |= self._guard.knows(tensors_of(args))
        return func(*args, **(kwargs or {}))


_PAST_OPERATORS = TAKING | WRITING_UNSEEN | {"__set__", "tolist"}


class _Read(dict[str, Tensor | None]):
    """A table of a module's tensors, of which some are made when they are read, of what ``made_of`` says by the id of
    what is held in their place: anew, once those that were ``read`` are forgotten. ``told`` hears of what was made.

    ``made_of`` keeps what is held alive, which a forward may take out of the table: else its id may become another's.
    """

    def __init__(
        self,
        held: Mapping[str, Tensor | None],
        made_of: Mapping[int, tuple[Tensor, str, Tensor]],
        change: Change,
        read: MutableMapping[int, Tensor],
        guard: _Guard | None = None,
    ) -> None:
        super().__init__(held)
        self._made_of, self._change = made_of, change
        self.told: Callable[[Tensor], None] = lambda _tensor: None
        self.read, self.guard = read, guard

    def __getitem__(self, name: str) -> Tensor | None:
        held = super().__getitem__(name)
        if held is None or id(held) not in self._made_of:
            return held
        made = self.read.get(id(held))
        if made is None:
            room = None if self.guard is None else self.guard.room
            outer = _room.set(room)
            try:
                with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                    _, of, stored = self._made_of[id(held)]
                    made = self._change(of, stored).detach()
                    if room is not None and not room.lent(made):
                        made = room.empty(made.shape, made.dtype, made.stride()).copy_(made)
                    made = like(held, made).requires_grad_(False)
            finally:
                _room.reset(outer)
            self.read[id(held)] = made
            self.told(made)
        return made


def _tables(network: nn.Module) -> list[_Read]:
    tables = (table for module in network.modules() for table in (module._parameters, module._buffers))
    return [table for table in tables if isinstance(table, _Read)]


def _copy(network: nn.Module, change: Change) -> nn.Module:
    copied = changed_copy(network, lambda name, tensor: change(name, tensor.detach()), to_run=True)
    for path, module in named_modules(copied):
        if isinstance(module, jit.ScriptModule):  # which is copied with its tensors as they are
            for name, tensor in own_tensors(module).items():
                tensor.data = change(join(path, name), tensor.detach())
    for parameter in copied.parameters():
        if parameter.is_leaf:  # a scripted module copies its parameters with their history
            parameter.requires_grad_(False)
    set_eval(copied)
    return copied


def run(network: nn.Module, trials: Iterable[Trial], cast: Mapping[torch.dtype, torch.dtype]) -> list[Outcome]:
    """Call a copy of the network on each trial, floating inputs cast as ``cast`` says (dtypes not named stay).

    Raises RepfuseError where the network cannot be copied.
    """
    trials, outcomes = list(trials), list[Outcome]()
    for copy in readable(network, as_stored):
        outcomes = run_copy(copy, trials, cast)
    return outcomes


def takes(network: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether the network, as it is stored, runs on ``inputs``."""
    return not run(network, [Trial("", tuple(inputs))], {})[0].error


def run_copy(copy: nn.Module, trials: Iterable[Trial], cast: Mapping[torch.dtype, torch.dtype]) -> list[Outcome]:
    """Call one of our copies itself on each trial: the call may change it."""
    device = device_of(copy)
    return _calls(copy, [placed(trial.inputs, device, cast) for trial in trials])


def enough_threads(network: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return how many threads of torch's the work on a network is worth: all, or one where that is about as fast.

    Threads wait for each other at the end of each operation, and on a busy machine, or in a container that may use less
    than it sees, the last one comes when the system gives it its turn, milliseconds later: with all of them a network
    of many small operations can take ten times what it takes with one. So it is tried; where a network is large, most
    of its work is products of matrices, and a few of these are tried in its place.
    """
    count = torch.get_num_threads()
    if count == 1:
        return 1
    if is_large(network):
        one, all_of_them = (min(_seconds(multiply, threads) for _ in range(PRODUCTS)) for threads in (1, count))
        return count if all_of_them <= WORTH_THREADS * one else 1
    with copied(network, as_stored) as copy:
        called = partial(run_copy, copy, [Trial("the example", inputs)], {})
        one = _seconds(called, 1)
        return 1 if one <= SHORT or _seconds(called, count) > WORTH_THREADS * one else count


def _seconds(work: Callable[[], object], threads: int) -> float:
    with using_threads(threads):
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


def multiply() -> None:
    """Multiply two matrices: a few milliseconds of work."""
    matrix = torch.ones(512, 512)
    torch.mm(matrix, matrix)


PRODUCTS = 8  # of which the first wake the threads
SHORT = 0.1  # seconds of a call with one thread: with less, all calls together take few seconds
WORTH_THREADS = 0.8
"""The part of the time with one thread that a call has to take at most, to be worth the others: of a network, that was
the first call, which prepares what later ones find.
"""


def run_float64(
    network: nn.Module,
    trials: Iterable[Trial],
    change: Change = in_float64,
    watch: Callable[[nn.Module], object] = lambda _copy: None,
    *,
    whole: bool = False,
) -> list[Outcome]:
    """Call a copy of the network in float64 on each trial, inputs widened too; its tensors are as ``change`` says.

    ``watch`` is shown each copy before it is called. It is ``whole`` where it is much work to make its tensors. What
    fails for want of float64 runs in its own dtype, which the outcomes say. Raises RepfuseError where the network
    cannot be copied.
    """
    trials, given, narrow = list(trials), WIDE, tuple[str, ...]()
    outcomes = _run_wide(network, trials, change, watch, given, narrow, whole)
    failing = bool(trials) and all(outcome.error for outcome in outcomes) and takes(network, trials[0].inputs)
    while failing:
        path = outcomes[0].at
        if not path and given:  # the outermost module first gets its inputs as they are: they are widened all the same
            given = {}
        elif any(within(path, other) for other in narrow):
            break
        else:
            narrow = (*(other for other in narrow if not within(other, path)), path)
        outcomes = _run_wide(network, trials, change, watch, given, narrow, whole)
        failing = all(outcome.error for outcome in outcomes)
    return outcomes


def _run_wide(  # noqa: PLR0917 - what ``run_float64`` was given, and what it found
    network: nn.Module,
    trials: Sequence[Trial],
    change: Change,
    watch: Callable[[nn.Module], object],
    given: Mapping[torch.dtype, torch.dtype],
    narrow: tuple[str, ...],
    whole: bool,
) -> list[Outcome]:
    """Call a new copy on each trial, inputs cast as ``given``, the modules at ``narrow`` in their own dtype."""

    def narrowed(name: str, tensor: Tensor) -> Tensor:
        wide = change(name, tensor)
        return wide.to(tensor.dtype) if any(within(name, path) for path in narrow) else wide

    changed = narrowed if narrow else change
    outcomes, own, compiled = list[Outcome](), list[str](), False
    for copy in readable(network, changed, whole=whole):
        device, widening = device_of(copy), Widening(copy)
        for path in narrow:
            dtype = main_dtype(network.get_submodule(path)) or main_dtype(network)
            if dtype is not None:
                _in_own_dtype(copy.get_submodule(path), dtype, widening)
        watch(copy)
        compiled = not given and any(isinstance(part, jit.ScriptModule) for part in copy.modules())
        outcomes, inputs = list[Outcome](), [placed(trial.inputs, device, given) for trial in trials]
        with Depthwise():
            while len(outcomes) < len(inputs):
                # Where nothing was to be kept wide in a call that went through, the mode is left out: under it, each
                # function takes longer.
                refused = all(outcome.error for outcome in outcomes)
                with widening if narrow or widening.acted or refused else nullcontext():
                    outcomes += _calls(copy, inputs if is_streamed(network) else inputs[len(outcomes) :][:1])
        own = [path for path, part in named_modules(copy) if getattr(part, "narrow", False)]
    return [replace(outcome, narrow=("",) if compiled else (*narrow, *own)) for outcome in outcomes]


def within(path: str, outer: str) -> bool:
    """Whether the module or tensor at ``path`` is, or is in, the module at ``outer``."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def _in_own_dtype(module: nn.Module, dtype: torch.dtype, widening: Widening) -> None:
    """Let one of our copies get its inputs in ``dtype``, and what it gives be widened."""
    forward = module.forward

    def narrow(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype is torch.float64 else x

    def narrowed(*args: Any, **kwargs: Any) -> Any:
        widening.resting = True
        try:
            args, kwargs = tree_map(narrow, (args, kwargs))
            output = forward(*args, **kwargs)
            return tree_map(widening.wide, output)
        finally:
            widening.resting = False

    vars(module)["forward"] = narrowed


def _calls(copy: nn.Module, inputs: Sequence[tuple[object, ...]]) -> list[Outcome]:
    """Call one of our copies on each of the inputs; a graph that is streamed on all of them at once, line by line, so
    that each of its tensors is made but once.
    """
    tables = _tables(copy)
    guard = next((table.guard for table in tables if table.guard is not None), None)
    if guard is not None:
        with guard, _PastOperators(guard):
            outcomes = [call(copy, given) for given in inputs]
        guard.wrong |= any(outcome.error for outcome in outcomes)  # what stands for a tensor may be why
        return outcomes
    if not tables or not isinstance(copy, fx.GraphModule) or "forward" in vars(copy):
        return [call(copy, given) for given in inputs]
    return _in_step(copy, tables, inputs)


@torch.no_grad()
def _in_step(copy: fx.GraphModule, tables: Sequence[_Read], inputs: Sequence[tuple[object, ...]]) -> list[Outcome]:
    runs, failed, output = [fx.Interpreter(copy) for _ in inputs], dict[int, Outcome](), list(copy.graph.nodes)[-1]
    for run, given in zip(runs, inputs, strict=True):
        run.args_iter = iter(given)
    with as_before(copy):
        draw_alike(copy, SEED)
        for line in copy.graph.nodes:
            for number, run in enumerate(runs):
                try:
                    if number not in failed:
                        run.env[line] = run.run_node(line)
                except Exception as error:  # whatever a line may raise
                    failed[number] = Outcome({}, described(error), _raised_in(copy, error))
                    run.env.clear()
                for used in run.user_to_last_uses.get(line, ()):
                    run.env.pop(used, None)
            for table in tables:
                table.read.clear()
    return [failed.get(number) or _outcome(run.env[output]) for number, run in enumerate(runs)]


def _outcome(output: Any) -> Outcome:
    return Outcome({name: leaf.to("cpu", copy=True) for name, leaf in leaves(output).items()})


@torch.no_grad()
def call(network: nn.Module, inputs: tuple[object, ...]) -> Outcome:
    """Call the network; what it raises becomes the outcome's error."""
    with as_before(network):
        draw_alike(network, SEED)
        try:
            output = network(*inputs)
        except Exception as error:  # whatever a forward may raise
            return Outcome({}, described(error), _raised_in(network, error))
    return _outcome(output)


def _raised_in(network: nn.Module, error: Exception) -> str:
    """Return the path of the innermost module that was being called when ``error`` was raised."""
    path_of = {id(module): path for path, module in named_modules(network)}
    inside = ""
    for frame, _ in walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not isinstance(module, jit.ScriptModule):
            inside = path_of.get(id(module), inside)
    return inside
