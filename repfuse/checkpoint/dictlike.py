"""Dictionaries of other libraries, read as the dictionaries that they are.

Configurations come in subclasses of dict (Lightning's AttributeDict, MMEngine's ConfigDict, ...). torch's restricted
unpickler fills nothing but dict, OrderedDict and Counter, so each is played by an OrderedDict that remembers its class:
as data it is a dictionary, as a part of a network it is still refused, for the class is not there.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

from repfuse.checkpoint.inert import ORIGIN, GlobalName, StandIn

NAMES = frozenset({"AttributeDict", "ConfigDict", "CfgNode", "EasyDict", "Munch", "defaultdict", "addict.Dict"})


def is_dictlike(origin: GlobalName) -> bool:
    """Say whether the class of this name is known to be a dictionary."""
    return origin.name in NAMES or f"{origin.package}.{origin.name}" in NAMES


def dict_stand_in(origin: GlobalName) -> type:
    """Return a new stand-in for the dictionary class named ``origin``."""
    return _Class("StandIn", (_Played,), {"origin": origin})


class _Class(StandIn):
    def __call__(cls, *args: Any) -> Any:
        return _Played.__new__(cls, *args)  # type: ignore[arg-type]


class _Played(metaclass=_Class):
    origin: ClassVar[GlobalName]

    def __new__(cls, *_args: Any) -> Any:
        played: OrderedDict[Any, Any] = OrderedDict()
        vars(played)[ORIGIN] = str(cls.origin)
        return played
