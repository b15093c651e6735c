"""Which operators a file may name. torch looks a name up in ``torch``, ``math`` and ``operator``, and would take
``torch.os.system`` as well as ``torch.ops.aten.add.Tensor``.
"""

from __future__ import annotations

import re

import torch

NAME = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.([a-z]\w*|_\w+|[A-Z]\w*)\.(\w+)", re.ASCII)
HIGHER_ORDER = {
    f"torch.ops.higher_order.{name}"
    for name in (
        *("cond", "while_loop", "map_impl", "scan", "associative_scan", "invoke_subgraph"),
        *("wrap_with_set_grad_enabled", "wrap_with_autocast"),
    )
}
ON_SIZES = {
    *(f"_operator.{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "getitem")),
    *(f"_operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "pos")),
    *(f"math.{name}" for name in ("ceil", "floor", "trunc", "sqrt")),
    *(f"torch.{name}" for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")),
    *(f"torch.{name}" for name in ("_sym_sqrt", "sym_sum")),
}
TEXTS = {  # the operators that take a text which is a mode and not the name of a file
    *("conv1d", "conv2d", "conv3d", "div", "div_", "einsum", "gelu", "gelu_", "pad", "meshgrid", "searchsorted"),
    *("scatter", "scatter_", "scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_", "stft"),
    *("quantile", "nanquantile", "linalg_norm", "linalg_matrix_norm", "linalg_svd", "linalg_qr", "linalg_eigh"),
    *("_assert_scalar", "_assert_async", "_functional_assert_scalar", "_functional_assert_async"),
}
PRIVATE = {  # those with a leading underscore that torch.export writes; the others check their arguments less
    *("_assert_tensor_metadata", "_to_copy", "_softmax", "_log_softmax", "_unsafe_view", "_unsafe_index"),
    *("_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "_weight_norm", "_convolution"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_shape_as_tensor", "_prelu_kernel", "_conj", "_trilinear"),
    *("_fft_c2r", "_fft_r2c", "_fft_c2c", "_cdist_forward", "_local_scalar_dense", "_transformer_encoder_layer_fwd"),
}
CARELESS = ("Any", "Storage", "Dict", "Stream")  # types of arguments that no network has


def is_operator(name: str) -> bool:
    """Whether ``name`` is an operator on tensors or sizes, which reads and writes nothing but its arguments.

    Operators of other libraries (torchvision) count where the library is imported.
    """
    if name in HIGHER_ORDER or name in ON_SIZES:
        return True
    match = NAME.fullmatch(name)
    if match is None:
        return False
    namespace, base, overload = match.groups()
    if base.startswith("_") and base not in PRIVATE | TEXTS:
        return False
    schema = _schema(namespace, base, overload)
    return schema is not None and _only_computes(schema, base)


def _schema(namespace: str, base: str, overload: str) -> torch._C.FunctionSchema | None:
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    except (AttributeError, RuntimeError):
        return None
    return found._schema if isinstance(found, torch._ops.OpOverload) else None


def _only_computes(schema: torch._C.FunctionSchema, base: str) -> bool:
    types = [str(argument.type) for argument in schema.arguments]
    texts = any(re.search(r"\bstr\b", name) for name in types)
    return (base in TEXTS or not texts) and not any(name in kind for kind in types for name in CARELESS)
