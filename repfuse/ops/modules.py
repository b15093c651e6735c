"""What a call of a stock PyTorch module means. A row per class; subclasses that keep the forward are covered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from repfuse.algebra.expression import Convolution, Normalisation
from repfuse.ops.convolution import geometry
from repfuse.ops.meaning import Convolved, Meaning, Normed, Same, Unfusible


def module_meaning(node: fx.Node, module: nn.Module) -> Meaning | None:
    """Return what calling ``module`` at ``node`` means, or None where it is nothing that repfuse merges."""
    row = next((row for kind, row in _ROWS if isinstance(module, kind)), None)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if row is None or len(node.args) + len(node.kwargs) != 1 or not isinstance(x, fx.Node):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return Unfusible("hooks", f"{type(module).__name__} carries forward hooks")
    if parametrize.is_parametrized(module):
        return Unfusible("computed-weight", f"{type(module).__name__} has a parametrised weight")
    return row(x, module, str(node.target))


def _convolution(x: fx.Node, module: Any, path: str) -> Meaning | None:
    if module.transposed:
        return None
    if type(module)._conv_forward is not _stock_conv_forward(module):
        return Unfusible("custom-convolution", f"{type(module).__name__} overrides _conv_forward")
    shape = geometry(
        module.weight.shape,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        padding_mode=module.padding_mode,
    )
    bias = None if module.bias is None else f"{path}.bias"
    return Convolved(x, Convolution(shape, f"{path}.weight", bias))


def _stock_conv_forward(module: nn.Module) -> Any:
    return next(vars(kind)["_conv_forward"] for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))


def _batch_norm(x: fx.Node, module: Any, path: str) -> Meaning:
    if module.training or module.running_mean is None or module.running_var is None:
        return Unfusible("training-norm", f"{type(module).__name__} uses the statistics of the batch")
    weight, bias = (f"{path}.{name}" if getattr(module, name) is not None else None for name in ("weight", "bias"))
    statistics = (f"{path}.running_mean", f"{path}.running_var")
    return Normed(x, Normalisation(*statistics, weight, bias, module.eps))


def _dropout(x: fx.Node, module: nn.Module, _path: str) -> Meaning | None:
    return None if module.training else Same(x)


def _identity(x: fx.Node, _module: nn.Module, _path: str) -> Meaning:
    return Same(x)


_ROWS: tuple[tuple[type[nn.Module], Callable[[fx.Node, Any, str], Meaning | None]], ...] = (
    (_ConvNd, _convolution),
    (_BatchNorm, _batch_norm),
    (nn.modules.dropout._DropoutNd, _dropout),
    (nn.Identity, _identity),
)
