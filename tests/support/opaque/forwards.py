"""Forwards that no symbolic trace can follow, each a function of a module with the blocks ``a``, ``b``, ``c``, and x.

The blocks take and give ``[N, C, H, W]``. ``sign`` makes a forward decide by the values that it meets.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def sign(x: Tensor) -> float:
    """What no trace can follow."""
    return 1.0 if float(x.mean()) > 0 else -1.0


def _branches(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if sign(x) > 0 else m.b(x)


def _by_shape(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if int(x.shape[-1]) % 2 else m.b(m.a(x))


def _early_exit(m: Any, x: Tensor) -> Tensor:
    for block in (m.a, m.b, m.c):
        x = block(x)
        if sign(x) > 0:
            break
    return x


def _both(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * sign(x)


def _sum_of_parts(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) * sign(x)


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.a(m.a(x) * sign(x))


def _sizes(m: Any, x: Tensor) -> Tensor:
    y = m.a(x[..., ::2, ::2])
    return m.a(x) * sign(x) + y.mean() / 2  # whole, it would cancel on one pixel, and rounding decide the next sign


def _batches(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.a(one) for one in x.split(1)])


def _by_forward(m: Any, x: Tensor) -> Tensor:
    return m.a.forward(m.b(x)) * sign(x)


def _outer_weight(m: Any, x: Tensor) -> Tensor:
    weight = next(p for p in m.a.parameters() if p.dim() == 4)
    return m.a(x) * sign(x) + weight.mean()


def _functional_weight(m: Any, x: Tensor) -> Tensor:
    conv = next(p for p in m.a.modules() if isinstance(p, nn.Conv2d))
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return m.a(x) * sign(x) + y.mean() / 2  # whole, it would cancel on one pixel, and rounding decide the next sign


def _rare_weight(m: Any, x: Tensor) -> Tensor:
    if sign(x) > 0:
        return m.a(x)
    weight = next(p for p in m.a.parameters() if p.dim() == 4)
    return x + weight.mean()


def _rare_child(m: Any, x: Tensor) -> Tensor:
    if sign(x) > 0:
        return m.a(x)
    conv = next(p for p in m.a.modules() if isinstance(p, nn.Conv2d))
    return conv(x).mean() + x


def _state_dict(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * sign(x) + sum(t.double().mean() for t in m.a.state_dict().values())


def _walk(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * sign(x) + sum(p.mean() for p in m.parameters())


def _in_place_input(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    z = m.a(y) * sign(x)
    y.mul_(2)
    return z + m.b(y)


def _in_place_output(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.mul_(sign(x))
    return m.b(y) + y


def _overwritten_input(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    z = m.scaler(y)
    return m.a(y) + z * sign(x)


def _in_dict(m: Any, x: Tensor) -> Tensor:
    return m.dicts({"x": x, "scale": sign(x)})["y"]


def _dict_of_tensors(m: Any, x: Tensor) -> Tensor:
    return m.tensors({"x": x, "z": x * sign(x)})["y"]


@dataclass
class Held:
    """What a part is given, and gives."""

    x: Tensor
    scale: float = 1.0


def _dataclass(m: Any, x: Tensor) -> Tensor:
    return m.held(Held(x, sign(x))).x


def _namespace(m: Any, x: Tensor) -> Tensor:
    return m.spaced(types.SimpleNamespace(x=x)).x * sign(x)


def _keyword(m: Any, x: Tensor) -> Tensor:
    return m.keyed(x, scale=2.0) * sign(x)


def _other_keyword(m: Any, x: Tensor) -> Tensor:
    return m.keyed(x, scale=2.0 if sign(x) > 0 else 3.0)


def _keyword_left_out(m: Any, x: Tensor) -> Tensor:
    return m.keyed(x) if sign(x) > 0 else m.keyed(x, scale=3.0)


def _tensor_keyword(m: Any, x: Tensor) -> Tensor:
    return m.keyed(x, shift=x * 2) * sign(x)


def _rare_tensor_keyword(m: Any, x: Tensor) -> Tensor:
    return m.keyed(x, shift=x * 2) if sign(x) > 0 else m.keyed(x)


def _stars(m: Any, x: Tensor) -> Tensor:
    return m.starred(x, x * 2, extra=x * 3) * sign(x)


def _fewer_stars(m: Any, x: Tensor) -> Tensor:
    return m.starred(*([x] * (2 if sign(x) > 0 else 3)))


def _context(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return m.a(x) * sign(x)


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.b(m.a(x))


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(m.a, x, use_reentrant=False) * sign(x)


def _checkpointed_alone(m: Any, x: Tensor) -> Tensor:
    return checkpoint(m.a, x, use_reentrant=False)


def _counting(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.a(x) * sign(x) + m.count * 0


def _caching(m: Any, x: Tensor) -> Tensor:
    key = tuple(x.shape)
    if getattr(m, "cached", (None, None))[0] != key:
        m.cached = key, torch.ones(x.shape[-1], dtype=x.dtype)
    return m.a(x) * m.cached[1]


def _caching_weight(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "summed"):
        m.summed = sum(p.sum() for p in m.a.parameters()).detach()
    return m.a(x) * sign(x) + m.summed


def _recursive(m: Any, x: Tensor, depth: int = 2) -> Tensor:
    return m.a(x) * sign(x) if depth == 0 else _recursive(m, m.b(x), depth - 1)


def _self_calling(m: Any, x: Tensor) -> Tensor:
    return m.again(x, 2) * sign(x)


def _plain_list(m: Any, x: Tensor) -> Tensor:
    return m.hidden[0](x) * sign(x)


def _plain_list_of_own(m: Any, x: Tensor) -> Tensor:
    return m.alias[0](x) * sign(x) + m.alias[1](x)


def _by_key(m: Any, x: Tensor) -> Tensor:
    return m.by_key["plus" if sign(x) > 0 else "minus"](x)


def _scripted(m: Any, x: Tensor) -> Tensor:
    return m.a(m.scripted(x)) * sign(x)


def _parallel(m: Any, x: Tensor) -> Tensor:
    return m.parallel(x) * sign(x)


def _training_inside(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * sign(x) + m.b(x) * m.training


def _identity(m: Any, x: Tensor) -> Tensor:
    y = m.same(x)
    return m.a(y) * (2.0 if y is x else 1.0) * sign(x)


def _view(m: Any, x: Tensor) -> Tensor:
    y = m.viewing(x * 1.0)
    y.mul_(sign(x))
    return m.a(y)


def _is_same_object(m: Any, x: Tensor) -> Tensor:
    first, second = m.pair(x)
    return (m.a(first) if first is second else m.b(second)) * sign(x)


def _type_of_block(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * sign(x) + (1.0 if isinstance(m.a, nn.Sequential) else 2.0)


def _len_of_block(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * sign(x) + len(list(m.a.children()))


def _by_index(m: Any, x: Tensor) -> Tensor:
    y = x
    for inner in m.row.children():
        y = inner(y) * sign(x)
    return y


def _slices(m: Any, x: Tensor) -> Tensor:
    return m.row[1:](m.row[0](x)) * sign(x)


def _partial(m: Any, x: Tensor) -> Tensor:
    return functools.reduce(lambda y, block: block(y), [m.a, m.b], x) * sign(x)


def _output_of_hook(m: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    inner = next(p for p in m.a.modules() if isinstance(p, nn.Conv2d))
    handle = inner.register_forward_hook(lambda _m, _x, y: seen.append(y))
    try:
        return m.a(x) * sign(x) + seen[0].mean()
    finally:
        handle.remove()


def _setattr(m: Any, x: Tensor) -> Tensor:
    m.a.scale = sign(x)
    return m.a(x) * m.a.scale


def _method(m: Any, x: Tensor) -> Tensor:
    return m.keyed.features(x) * sign(x) + m.keyed(x)


def _rare_method(m: Any, x: Tensor) -> Tensor:
    return m.keyed(x) if sign(x) > 0 else m.keyed.features(x)


def _none_argument(m: Any, x: Tensor) -> Tensor:
    return m.keyed(x, shift=None) * sign(x)


def _same_twice(m: Any, x: Tensor) -> Tensor:
    return m.two(x, x) * sign(x) + m.two(x, x * 2)


def _same_once(m: Any, x: Tensor) -> Tensor:
    return m.two(x, x) if sign(x) > 0 else m.two(x, x * 2)


def _broadcast(m: Any, x: Tensor) -> Tensor:
    return m.two(x, x[:1]) * sign(x)


_ALL = {name: value for name, value in list(globals().items()) if inspect.isfunction(value) and name[0] == "_"}
FORWARDS = {name.removeprefix("_"): value for name, value in _ALL.items()}
"""By name."""
