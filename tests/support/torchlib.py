"""Exports to ONNX without parsing the 500 functions of onnxscript's torchlib each time, as torch.onnx.export does."""

from __future__ import annotations

import sys
from functools import cache


def parse_once() -> None:
    """Let each function be parsed once in this process, where onnxscript is loaded."""
    values = sys.modules.get("onnxscript._internal.values")
    if values and not hasattr(parsed := values.TracedOnnxFunction.function_ir.fget, "cache_info"):
        values.TracedOnnxFunction.function_ir = property(cache(parsed))


def parse_all() -> None:
    """Parse them now, for copies of this process."""
    from onnxscript._framework_apis.torch_2_6 import get_torchlib_ops

    parse_once()
    get_torchlib_ops()
