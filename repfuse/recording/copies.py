"""Copies of a module for looking at and for rewriting: its structure, with other tensors in it; and what it holds."""

from __future__ import annotations

import copy
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain, filterfalse
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, jit, nn
from torch.nn.modules.conv import _ConvNd

from repfuse.errors import RepfuseError
from repfuse.networks import join, named_modules, named_tensors
from repfuse.wording import described

_CODE = object()
TO_RUN = {id(_CODE): True}
"""What tells ``copy_with`` that a copy is only to run: then it has the graphs of torch.fx in it, and the code that was
made of them, in common with the original. To copy these takes much longer than all the rest.
"""


def changed_copy(module: nn.Module, change: Callable[[str, Tensor], Tensor], *, to_run: bool = False) -> nn.Module:
    """Copy a module whose tensors become ``change(name, tensor)``; shared ones stay shared, parameters parameters.

    Plain tensor attributes count too; ``to_run`` is as TO_RUN says. Raises RepfuseError where the module cannot be
    copied.
    """
    made = {id(tensor): like(tensor, change(name, tensor)) for name, tensor in named_tensors(module)}
    return copy_with(module, TO_RUN | made if to_run else made)


def copy_with(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy a module with these replacements by identity, and copies of tensors that cannot be copied so.

    Raises RepfuseError where it cannot be copied.
    """
    try:
        return _copied(module, dict(memo))
    except Exception:  # a few networks hold what takes more care: to look for it each time takes as long as the copy
        memo = _hard_to_copy(module, memo) | _shared(module) | memo
        try:
            return _copied(module, memo)
        except Exception as error:
            culprit = _uncopyable(module)
            raise RepfuseError(
                f"{type(module).__name__} cannot be copied{f', because of {culprit}' if culprit else ''}.",
                described(error),
                "Remove what cannot be copied (open files, generators) from its attributes.",
            ) from error


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return ``copy.deepcopy(module, memo)``: plain modules attribute by attribute, which takes a fifth of the time."""
    known: nn.Module | None = memo.get(id(module))
    if known is not None:
        return known
    kind: Any = type(module)
    shared = _OF_GRAPHS if isinstance(module, fx.GraphModule) and id(_CODE) in memo and _is_usual(module) else ()
    if not shared and not _is_plain(kind):
        return copy.deepcopy(module, memo)
    made: nn.Module = object.__new__(kind)
    memo[id(module)] = made
    # What refers back to a module that deepcopy meets on the way finds the copy that is under way.
    held, own, left = vars(made), vars(module), list[str]()
    held.update(own)
    held.pop(_COMPILED, None)
    for name, value in own.items():
        kind = type(value)
        if kind in _IMMUTABLE:
            continue
        if kind in _CONTAINERS and not value and name in _HOOKS:  # as nearly all of them
            held[name] = value.copy()
        elif name in held and name not in shared:
            held[name] = None  # nothing is the original's while others are copied
            left.append(name)
    for name in left:
        held[name] = _copied_value(own[name], memo)
    return made


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _IMMUTABLE or (kind is tuple and _IMMUTABLE.issuperset(map(type, value))):
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind is dict:
        made = memo[id(value)] = {}
        for key, item in value.items():
            made[key if type(key) is str else _copied_value(key, memo)] = _copied_value(item, memo)
        return made
    if kind is list:
        several = memo[id(value)] = []
        several += [_copied_value(item, memo) for item in value]
        return several
    return _copied(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


_CONTAINERS = frozenset({dict, list, set, OrderedDict})
_HOOKS = frozenset(name for name, x in vars(nn.Module()).items() if type(x) in (OrderedDict, set))
"""The tables of a module that hold something where people put it there."""
OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
_COMPILED = "_compiled_call_impl"
"""What PyTorch calls in the place of a module that it compiled."""
_IMMUTABLE = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})


def attributes(module: nn.Module) -> list[str]:
    """Return the names of what a module holds beside what every module has."""
    return [*filterfalse(OF_MODULES.__contains__, vars(module))]


_SPECIAL = ("__deepcopy__", "__getstate__", "__new__", "__reduce__", "__reduce_ex__", "__slots__", "__setstate__")
_KNOWN = (nn.Module, _ConvNd)
"""Whose ``__setstate__`` adds what files of old versions lack, and nothing to the attributes of an object of today."""


def is_copied_plainly(module: nn.Module) -> bool:
    """Whether copying a module means copying its attributes: its class does nothing of its own."""
    kind: Any = type(module)
    return _is_plain(kind)


_OF_GRAPHS = ("_graph", "meta")


def _is_usual(module: fx.GraphModule) -> bool:
    """Whether a graph is as torch.fx makes and copies them: without hooks, which it does not copy."""
    plain = type(module).__deepcopy__ is fx.GraphModule.__deepcopy__
    return plain and not any(map(vars(module).get, _HOOKS))


@cache
def _is_plain(kind: Any) -> bool:
    if issubclass(kind, jit.ScriptModule):
        return False
    own = (name for base in kind.__mro__[:-1] if base not in _KNOWN for name in vars(base) if name in _SPECIAL)
    return not any(own)


def _hard_to_copy(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Return copies of the tensors that refuse to be copied: with a history, which old weight_norm leaves behind, or
    sparse.
    """
    tensors = [tensor for _, tensor in named_tensors(module) if id(tensor) not in memo]
    hard = [tensor for tensor in tensors if not tensor.is_leaf or tensor.layout is not torch.strided]
    return {id(tensor): like(tensor, tensor.detach().clone()) for tensor in hard}


_PLAIN = _IMMUTABLE | _CONTAINERS | {tuple}
_SHARED = (ModuleType, type(threading.Lock()), type(threading.RLock()))


def _shared(module: nn.Module) -> dict[int, Any]:
    """Return what a copy has in common with the original: Python's modules, and locks."""
    return {
        id(value): value
        for _, part in named_modules(module)
        if not _PLAIN.issuperset(map(type, vars(part).values()))  # a look at each in Python takes three times as long
        for value in vars(part).values()
        if isinstance(value, _SHARED)
    }


def _uncopyable(module: nn.Module) -> str:
    """Return the name of the first attribute that cannot be copied, or ""."""
    shared = _shared(module)
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            try:
                if not name.startswith("_"):
                    copy.deepcopy(value, dict(shared))
            except Exception:
                return join(path, name)
    return ""


@contextmanager
def restored(root: nn.Module) -> Iterator[None]:
    """Undo, at the end, what is set on the modules in between, and in their tables."""
    tables = [table for _, module in named_modules(root) for table in _own_tables(module)]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` as what ``tensor`` is: a parameter that is trained or not, or a plain tensor; no history."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value.detach()


class State:
    """What a module holds, itself, as far as it can be told apart later by identity."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        tables = _tables(module)
        self.live = [table.values() if isinstance(table, dict) else table for table in tables]
        self.before = [list(x) if isinstance(x, set) else x.copy() for x in tables]  # a set's copy has another order
        self.values = list(chain.from_iterable(self.live))

    def now(self) -> State:
        """Return what the module holds now: this, where nothing has changed."""
        return self if self.is_same() else State(self._module)

    def is_same(self) -> bool:
        """Whether the module holds what it did."""
        return _are_same(self.live, map(len, self.before), self.values)

    def changes(self, *, forward: bool = False) -> Iterator[tuple[Any, Any]]:
        """Yield what was held and what is held instead; _MISSING where there is nothing. The recorder itself puts a
        ``forward`` into some.
        """
        if self.is_same():
            return
        now = _tables(self._module)
        if len(self.before) != len(now):
            yield None, None
            return
        for one, other in zip(map(_entries, self.before), map(_entries, now), strict=True):
            for key in {**one, **other}:
                old, new = one.get(key, _MISSING), other.get(key, _MISSING)
                same = old is new or (type(old) in _IMMUTABLE and type(old) is type(new) and old == new)
                if (
                    not same
                    and (key != "forward" or forward)
                    and not (type(old) in _WATCHED and type(new) is type(old))
                ):
                    yield old, new


class States(dict[nn.Module, State]):
    """What each module of a network holds."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__({module: State(module) for module in modules})
        self._live = [table for state in self.values() for table in state.live]
        self._lengths = [len(table) for state in self.values() for table in state.before]
        self._values = [*chain.from_iterable([state.values for state in self.values()])]

    def changed(self) -> Iterator[tuple[nn.Module, list[tuple[Any, Any]]]]:
        """Yield the modules that hold something else now, with their changes; a look at all at once is a third of the
        work of one at each.
        """
        if not _are_same(self._live, self._lengths, self._values):
            found = ((module, list(state.changes())) for module, state in self.items())
            yield from ((module, changes) for module, changes in found if changes)


def _are_same(live: Sequence[Collection[Any]], lengths: Iterable[int], values: Sequence[Any]) -> bool:
    same = all(map(operator.eq, map(len, live), lengths))
    return same and all(map(operator.is_, values, chain.from_iterable(live)))


_Table = dict[Any, Any] | list[Any] | set[Any]


def _tables(module: nn.Module) -> list[_Table]:
    """Return the attributes, the tables of a module, and the lists, dicts and sets among the attributes."""
    own = _own_tables(module)
    if own:
        own += [x for name in attributes(module) if type(x := own[0][name]) in _WATCHED]
    return own


def _own_tables(module: nn.Module) -> list[Any]:
    """Return the attributes and the tables of a module; none of a scripted one."""
    if isinstance(module, jit.ScriptModule):
        return []
    held = vars(module)
    return [held, *map(held.__getitem__, _OWN_TABLES)]


_OWN_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def _entries(table: _Table) -> dict[Any, Any]:
    return table if isinstance(table, dict) else dict(enumerate(table))


_MISSING = object()
_WATCHED = frozenset({list, dict, set})
"""What is looked into, where it is an attribute."""
