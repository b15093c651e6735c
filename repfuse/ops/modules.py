"""Calls of stock PyTorch modules, as calls of the operator that their forward runs. A row per class.

Subclasses that keep the forward are covered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.padding import _CircularPadNd, _ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd

from repfuse.ops.call import Call, Constant, is_data
from repfuse.ops.meaning import Unfusible
from repfuse.tracing.leaves import hooks_of, is_stock, rounds_like_quantised

if TYPE_CHECKING:
    from repfuse.ops.scope import Scope

Arguments = dict[str, Any]
Row = Callable[[Any, str], tuple[str, Arguments] | Unfusible | None]


def module_call(node: fx.Node, scope: Scope) -> Call | Unfusible | None:
    """Return the call of an operator that the call of a module stands for, or None where it is no known one."""
    module = scope.root.get_submodule(str(node.target))
    if rounds_like_quantised(module):
        return Unfusible("fake-quantised", f"{type(module).__name__} rounds values as a quantised model would")
    row = next((row for kind, row in _ROWS if isinstance(module, kind)), None)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if row is None or len(node.args) + len(node.kwargs) != 1 or not is_data(x, scope) or not is_stock(module):
        return None
    if hooks_of(module):
        return Unfusible("hooks", f"{type(module).__name__} carries hooks")
    if isinstance(module, _InstanceNorm) and len(scope.shape_of[x]) != module._get_no_batch_dim() + 1:  # type: ignore[no-untyped-call]
        return None
    found = row(module, str(node.target))
    return Call(node, found[0], {"input": x, **found[1]}) if isinstance(found, tuple) else found


def _convolution(module: Any, path: str) -> tuple[str, Arguments] | Unfusible | None:
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding")
    given = {name: getattr(module, name) for name in names}
    return _with_tensors("convolution", module, path, ("weight", "bias"), given)


def _linear(module: Any, path: str) -> tuple[str, Arguments] | Unfusible:
    return _with_tensors("linear", module, path, ("weight", "bias"), {})


def _norm(module: Any, path: str) -> tuple[str, Arguments] | Unfusible:
    by_input = module.training or not module.track_running_stats
    given = {"training": module.training, "use_input_stats": by_input, "eps": module.eps}
    tensors = ("weight", "bias", "running_mean", "running_var")
    return _with_tensors(
        "batch_norm" if isinstance(module, _BatchNorm) else "instance_norm", module, path, tensors, given
    )


def _with_tensors(
    operator: str, module: nn.Module, path: str, tensors: tuple[str, ...], given: Arguments
) -> tuple[str, Arguments] | Unfusible:
    """Add the tensors of the module by name; one that the module computes has no name."""
    found = {}
    for name in tensors:
        if getattr(module, name) is None:
            continue
        if name not in module._parameters and name not in module._buffers:
            return Unfusible("computed-weight", f"{type(module).__name__} computes its {name}")
        found[name] = Constant(f"{path}.{name}", tuple(getattr(module, name).shape))
    return operator, found | given


def _pad(mode: str) -> Row:
    def row(module: Any, _path: str) -> tuple[str, Arguments]:
        value = module.value if isinstance(module, _ConstantPadNd) else None
        return "pad", {"pad": module.padding, "mode": mode, "value": value}

    return row


def _pool(module: Any, _path: str) -> tuple[str, Arguments]:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    ndim = next(n for n, kind in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1) if isinstance(module, kind))
    return f"avg_pool{ndim}d", {name: getattr(module, name) for name in names if hasattr(module, name)}


def _shuffle(module: Any, _path: str) -> tuple[str, Arguments]:
    return "channel_shuffle", {"groups": module.groups}


def _dropout(module: nn.Module, _path: str) -> tuple[str, Arguments]:
    return "dropout", {"training": module.training}


def _identity(_module: nn.Module, _path: str) -> tuple[str, Arguments]:
    return "detach", {}


_ROWS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Row], ...] = (
    (_ConvNd, _convolution),
    (nn.Linear, _linear),
    (_NormBase, _norm),
    (_ConstantPadNd, _pad("constant")),
    (_ReflectionPadNd, _pad("reflect")),
    (_ReplicationPadNd, _pad("replicate")),
    (_CircularPadNd, _pad("circular")),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _pool),
    (nn.ChannelShuffle, _shuffle),
    (nn.modules.dropout._DropoutNd, _dropout),
    (nn.Identity, _identity),
)
