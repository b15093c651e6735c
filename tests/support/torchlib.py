"""Exports that do not find out again, each time, what is the same for all of them.

torch.onnx.export parses the 500 functions of onnxscript's torchlib and reads their signatures. To decompose operators,
torch.export looks up each that is a composition of others, once for each namespace; and it gives each of them a dozen
kernels by a function whose annotations are evaluated each time, which those of ``typing`` remember.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from functools import cache

import torch


def parse_once() -> None:
    """Let that be done once in this process, where the modules that do it are loaded."""
    values = sys.modules.get("onnxscript._internal.values")
    if values and not hasattr(parsed := values.TracedOnnxFunction.function_ir.fget, "cache_info"):
        values.TracedOnnxFunction.function_ir = property(cache(parsed))
    schemas = sys.modules.get("torch.onnx._internal.exporter._schemas")
    if schemas and not hasattr(read := schemas.op_signature_from_function, "cache_info"):
        schemas.op_signature_from_function = cache(read)
    exporting = sys.modules.get("torch._export.utils")
    if exporting and not hasattr(look_up := exporting._materialize_cpp_cia_ops, "found"):
        exporting._materialize_cpp_cia_ops = _Found(look_up)
    torch._ops.Callable = typing.Callable  # type: ignore[attr-defined]


def parse_all() -> None:
    """Do it now, for copies of this process."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parse_once()
    ONNXRegistry.from_torchlib()


class _Found:
    """Looks operators up where others are registered than the last time."""

    def __init__(self, look_up: Callable[[], None]) -> None:
        self.look_up, self.found = look_up, list[str]()

    def __call__(self) -> None:
        registered = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if registered != self.found:
            self.look_up()
            self.found = registered
