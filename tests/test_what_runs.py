"""Networks that run otherwise than a reader of their source would say: fused, they compute the same, at all sizes."""

from __future__ import annotations

import copy
import fractions
import functools
import io
import math
import pickle
import types
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from blocks import RepVGG, conv, conv_norm, norm
from support.agreement import image, operations, randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from repfuse.fusing import fuse
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite

SQUARES = ((1, 4, 9, 7), (3, 4, 5, 5), (2, 4, 12, 3))
LONG = ((1, 4, 300, 2), (2, 4, 2, 300), (1, 4, 3, 5), (2, 4, 6, 6))


@dataclass(frozen=True)
class Case:
    """A network, the shape of its example and other shapes, and the most (convolutions, norms, sums) that are left."""

    make: Callable[[], nn.Module]
    example: tuple[int, ...] = (1, 4, 6, 6)
    others: tuple[tuple[int, ...], ...] = SQUARES
    left: tuple[int, int, int] | None = None
    calls: int = 1
    dtype: torch.dtype = torch.float64


class Net(nn.Module):
    """A module whose forward is a function of this file, so that it can be saved."""

    def __init__(self, run: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            if type(member) is Tensor:
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def two(run: Callable[..., Any], **settings: Any) -> Callable[[], nn.Module]:
    """A network of a 3x3 ``a`` and a 1x1 ``b``."""
    return lambda: Net(run, a=conv(3, **settings), b=conv(1, **settings))


def lines(run: Callable[..., Any]) -> Callable[[], nn.Module]:
    """The same of linear layers of 8 features."""
    return lambda: Net(run, a=nn.Linear(8, 8), b=nn.Linear(8, 8))


def network(case: Case) -> nn.Module:
    """The network of a case, its weights small: some cases apply it many times."""
    model = randomised(case.make(), dtype=case.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


@torch.no_grad()
def agree(model: nn.Module, other: nn.Module, case: Case, shape: tuple[int, ...]) -> None:
    """Both must give the same, call after call; where the original raises, anything goes."""
    model, other, x = copy.deepcopy(model), copy.deepcopy(other), image(*shape, dtype=case.dtype)
    for call in range(case.calls):
        try:
            expected = tree_leaves(model(x.clone() * (1 - 2 * (call % 2))))
        except (RuntimeError, IndexError, ValueError):
            return
        found = tree_leaves(other(x.clone() * (1 - 2 * (call % 2))))
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            limit = 1e-11 if case.dtype is torch.float64 else 1e-5
            gap = float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)) if a.numel() else 0.0
            assert gap <= limit, f"at {shape} the results differ"


def read_again(module: nn.Module) -> nn.Module:
    held = io.BytesIO()
    torch.save(module, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


def can_be_saved(module: nn.Module) -> bool:
    try:
        read_again(module)
    except Exception:
        return False
    return True


def check(case: Case) -> None:
    """Check everything that a case says."""
    model = network(case)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(copy.deepcopy(model), (image(*case.example, dtype=case.dtype),)).module
    for shape in (case.example, *case.others):
        agree(model, fused, case, shape)
    if can_be_saved(model):
        again = read_again(fused)
        for shape in (case.example, case.others[0]):
            agree(model, again, case, shape)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if case.left is not None:
        seen = operations(copy.deepcopy(fused), image(*case.example, dtype=case.dtype))
        products = seen["convolution"] + seen["addmm"] + seen["mm"] + seen["linear"]
        left = products, seen["batch_norm"], seen["add"]
        assert all(a <= b for a, b in zip(left, case.left, strict=True)), left


# Slices that cover what the example has


def first_channels(m, x):
    x = x[:, :4]
    return m.a(x) + m.b(x)


def first_pixels(m, x):
    x = x[..., :6, :6]
    return m.a(x) + m.b(x)


def last_tokens(m, x):
    x = x[:, -5:]
    return m.a(x) + m.b(x)


def narrowed(m, x):
    x = x.narrow(2, 0, min(x.shape[2], 6))
    return m.a(x) + m.b(x)


def chosen_tokens(m, x):
    x = x[:, torch.arange(5)]
    return m.a(x) + m.b(x)


def channels_of_a_layer(m, x):
    return m.a(x)[:, :4] + m.b(x)


TOKENS = ((2, 9, 8), (3, 5, 8), (1, 3, 8), (1, 12, 8))
SLICES = {
    "channels": Case(two(first_channels), others=((1, 6, 5, 5), (2, 4, 7, 3), (2, 9, 3, 3))),
    "pixels": Case(two(first_pixels), others=((1, 4, 9, 4), (2, 4, 3, 12), (1, 4, 6, 7))),
    "tokens from behind": Case(lines(last_tokens), (1, 5, 8), TOKENS),
    "pixels, narrowed": Case(two(narrowed), others=LONG),
    "tokens by index": Case(lines(chosen_tokens), (1, 5, 8), TOKENS),
    "channels that weights fix": Case(two(channels_of_a_layer), left=(1, 0, 0)),
}


# Loops over pieces


def per_pieces_of_two(m, x):
    return torch.cat([torch.relu(m.a(t) + m.b(t)) for t in x.split(2)])


def per_image(m, x):
    return torch.stack([torch.relu(m.a(t) + m.b(t)) for t in x.unbind()])


def per_index(m, x):
    return torch.cat([torch.relu(m.a(x[i : i + 1]) + m.b(x[i : i + 1])) for i in range(len(x))])


def as_often_as_rows(m, x):
    for _ in range(x.shape[2] // 3):
        x = torch.relu(m.a(x) + m.b(x))
    return x


def per_chunk_of_tokens(m, x):
    return torch.cat([m.a(t) + m.b(t) for t in x.chunk(3, 1)], 1)


def until_small(m, x):
    while x.shape[-1] > 3:
        x = F.avg_pool2d(torch.relu(m.a(x) + m.b(x)), (1, 2))
    return x


BATCHES = ((1, 4, 5, 5), (2, 4, 3, 4), (5, 4, 6, 6))
LOOPS = {
    "batches": Case(two(per_pieces_of_two), (4, 4, 6, 6), BATCHES),
    "images": Case(two(per_image), (3, 4, 6, 6), BATCHES),
    "images by index": Case(two(per_index), (3, 4, 6, 6), BATCHES),
    "as often as a size says": Case(two(as_often_as_rows), others=SQUARES),
    "chunks": Case(lines(per_chunk_of_tokens), (1, 5, 8), TOKENS),
    "until a size is small": Case(two(until_small), (1, 4, 6, 12), ((1, 4, 6, 3), (2, 4, 5, 25), (1, 4, 6, 24))),
}


# Branches on a size: ``large`` says whether some side is above 256

KNOWN = {300: True}


def large_by_type(x):
    return isinstance(x.shape[2], int) and x.shape[2] > 256


def large_in_try(x):
    try:
        return max(x.shape[2], x.shape[3]) > 256
    except TypeError:
        return False


def large_by_text(x):
    return str(x.shape[2]).zfill(3) >= "256" and len(f"{x.shape[2]}") > 2


def large_by_format(x):
    return f"{x.shape[2]:>4}" == " 300"


def large_by_key(x):
    return KNOWN.get(x.shape[2], False)


def large_by_set(x):
    return x.shape[3] in {300, 301}


def large_by_hash(x):
    return hash(x.shape[2]) == hash(300)


def large_by_least(x):
    return min(x.shape[2], 257) == 257


def large_by_range(x):
    return x.shape[2] not in range(257)


def large_by_area(x):
    return x.shape[2] * x.shape[3] > 256


def large_by_size(x):
    return x.size(2) >= 257


def large_by_numel(x):
    return x.numel() // x.shape[0] // x.shape[1] > 256


def large_by_shape(x):
    return tuple(x.shape[2:]) in ((300, 2), (2, 300))


def large_by_equal_shapes(x):
    return x.shape[2:] == torch.Size([300, 2])


def large_by_sorting(x):
    return sorted([x.shape[2], 256])[1] != 256


def large_by_sides(x):
    return x.shape[2] > 50 * x.shape[3]


def large_by_square(x):
    return x.shape[2] == x.shape[3]


def large_by_odd(x):
    return bool(x.shape[2] % 2)


def large_by_quotient(x):
    return bool(x.shape[2] // 256)


def large_by_divmod(x):
    return divmod(x.shape[2], 256)[0] > 0


def large_by_match(x):
    match x.shape[2]:
        case 300:
            return True
    return False


def large_by_error(x):
    try:
        x[..., 256]
    except IndexError:
        return False
    return True


def large_by_reshaping(x):
    try:
        x.reshape(x.shape[0], 4, -1, 300)
    except RuntimeError:
        return False
    return True


def large_by_batch(x):
    return len(x) > 1


def large_by_list(x):
    return len([None] * x.shape[2]) > 256


def large_by_int(x):
    return int(x.shape[2]) > 256


def large_by_float(x):
    return float(x.shape[2]) > 256


def large_by_half(x):
    return x.shape[2] / 2 > 128


def large_by_root(x):
    return math.sqrt(x.shape[2]) > 16


def large_by_log(x):
    return math.ceil(math.log2(x.shape[2])) > 8


def large_by_power(x):
    return x.shape[2] ** 2 > 65536


def large_by_shift(x):
    return x.shape[2] >> 8 > 0


def large_by_bits(x):
    return x.shape[2].bit_length() > 8


def large_by_round(x):
    return round(x.shape[2], -2) > 200


def large_by_tensor(x):
    return bool(torch.tensor(x.shape[2]) > 256)


def large_by_linspace(x):
    return len(torch.arange(x.shape[2])) > 256


def large_by_product(x):
    return math.prod(x.shape[2:]) > 256


def large_by_sum(x):
    return sum(x.shape) > 256


def large_by_numel_of_shape(x):
    return x.shape[2:].numel() > 256


BY_SIZE = [value for name, value in list(globals().items()) if name.startswith("large_by_") or name == "large_in_try"]


# The same of ways that a size goes where no recorded size decides otherwise: all are below 256


def beyond_by_pieces(x):
    return len(x.split(256, 2)) > 1


def beyond_by_bytes(x):
    return x.shape[2].to_bytes(4, "big") > (256).to_bytes(4, "big")


def beyond_by_count_of_bits(x):
    return (x.shape[2] // 256).bit_count() > 0


def beyond_by_ratio(x):
    return x.shape[2].as_integer_ratio()[0] > 256


def beyond_by_part(x):
    return x.shape[2].real > 256 or x.shape[2].numerator > 256 or x.shape[2].conjugate() > 256


def beyond_by_fraction(x):
    return fractions.Fraction(x.shape[2], 2) > 128


def beyond_by_copy(x):
    return copy.deepcopy(list(x.shape))[2] > 256


def beyond_by_pickle(x):
    return pickle.loads(pickle.dumps(x.shape[2])) > 256


BEYOND = [value for name, value in list(globals().items()) if name.startswith("beyond_by_")]


class BySize(nn.Module):
    """3x3 + 1x1, without the 1x1 where a function says that the input is large."""

    def __init__(self, large):
        super().__init__()
        self.a, self.b, self.large = conv(3), conv(1), large

    def forward(self, x):
        return self.a(x) if self.large(x) else self.a(x) + self.b(x)


class BySizeBetween(BySize):
    """The question is asked of what a layer gives, between it and the next."""

    def forward(self, x):
        y = self.b(x)
        return self.b(torch.relu(y) if self.large(y) else y) + self.a(x)


def halved_while_large(m, x):
    """What is larger than at the example is refused where the other side is short, for another reason."""
    while x.shape[2] > 20:
        x = nn.functional.avg_pool2d(x, 2)
    return m.a(x) + m.b(x)


class ConvBySize(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2 if x.shape[2] == 17 else weight, bias)


class NormBySize(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        if x.shape[2] == 17:
            x.mul_(2)


class Passing(nn.Module):
    """Gives what it is given, but at one size."""

    def forward(self, x):
        return x * 2 if x.shape[2] == 17 else x


class PassingFirst(nn.Module):
    """Gives what it is given, but from the third call on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 2 if self.calls > 2 else x


def made_of(kind: Callable[[], nn.Module], run: Callable[..., Any]) -> Callable[[], nn.Module]:
    """A network that has such a module between its layers."""
    return lambda: Net(run, a=conv(3), b=conv(1), n=nn.BatchNorm2d(4), p=kind())


PASSING = {
    "between": lambda m, x: m.n(m.p(m.a(x))),
    "before": lambda m, x: m.a(m.p(m.n(x))),
    "in a branch": lambda m, x: m.a(x) + m.b(m.p(x)),
    "in a branch before another": lambda m, x: m.b(m.p(x)) + m.a(x),
    "a branch": lambda m, x: m.a(x) + m.p(x),
    "after the sum": lambda m, x: m.n(m.p(m.a(x) + m.b(x))),
}


def both_large(x):
    return x.shape[2] > 64 and x.shape[3] > 64


def all_large(x):
    return all(n > 64 for n in x.shape[2:])


def of_that_size(x):
    return x.shape[2] == 64 and x.shape[3] == 17


def tall_and_wide(x):
    """Tall ones that are not wide are refused, for another reason than that they are tall."""
    if x.shape[2] <= 64:
        return False
    if x.shape[3] <= 64:
        raise ValueError("tall images are to be wide")
    return True


def large_squares(x):
    if x.shape[2] != x.shape[3]:
        raise ValueError(f"{x.shape[2]} x {x.shape[3]}: squares only")
    return x.shape[2] > 128


def of_squares_in_pieces(m, x):
    if x.shape[2] != x.shape[3]:
        raise ValueError("squares only")
    return torch.cat([m.a(piece) + m.b(piece) for piece in x.split(16, 2)], 2)


def of_squares_in_parts(m, x):
    if x.shape[2] != x.shape[3]:
        raise ValueError("squares only")
    return (m.a(x) + m.b(x)).reshape(-1, 4, 16, 16)


def added_up_in_zeros(m, x):
    y = m.a(x) + m.b(x)
    total = torch.zeros(4, dtype=x.dtype)
    total += y.mean((0, 2, 3))
    return y * total[:, None, None]


def filled_by_chance(m, x):
    return (m.a(x) + m.b(x)).relu() + torch.empty(4, 1, 1).uniform_() + torch.rand(())


def in_three_pieces(m, x):
    return torch.cat([torch.relu(m.a(piece) + m.b(piece)) for piece in x.chunk(3, 2)], 2)


def in_pieces(m, x):
    return torch.cat([m.a(piece) + m.b(piece) for piece in x.split(256, 2)], 2)


def parted_behind_a_stride(m, x):
    """Of some sizes alone, at the nearest of which a stride leaves as much as at the example."""
    y = F.pad(F.conv2d(m.a(x) + m.b(x), m.b.weight, stride=(1, 2)), (0, 1))
    n, c, h, w = y.shape
    return y.view(n, c, h, w // 2, 2).sum(-1)


def in_windows(stride, window):
    """Of some sizes in a row alone, and then of others that are far from these."""

    def forward(m, x):
        y = (m.a(x) + m.b(x))[:, :, ::stride]
        n, c, h, w = y.shape
        return y.view(n, c, h // window, window, w).sum(3)

    return forward


# Branches on the number of axes


def lone_image(m, x):
    if x.dim() == 3:
        return (m.a(x[None]) - m.b(x[None]))[0]
    return m.a(x) + m.b(x)


def axes_by_length(m, x):
    y = m.a(x) + m.b(x)
    return y.relu() if len(x.shape) == 3 else y


def axes_by_unpacking(m, x):
    try:
        _b, _c, _h, _w = x.shape
    except ValueError:
        return m.a(x)
    return m.a(x) + m.b(x)


def sides_by_axes(m, x):
    y = m.a(x) + m.b(x)
    return y.mean(dim=tuple(range(1, x.ndim - 1)))


class Tracked(nn.Module):
    """What PyTorch's own module does for one image alone is by other functions: it is the same all the same."""

    def __init__(self):
        super().__init__()
        self.a, self.n = conv(3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def forward(self, x):
        return self.n(self.a(x))


def asks_for_two_axes(m, x):
    """At fewer axes it decides otherwise, and no layer here minds."""
    y = m.a(x) + m.b(x)
    return y if x.ndim < 2 else -y


RANKS = {
    "a norm of each image": Case(Tracked, others=((4, 5, 5), (2, 4, 3, 7), (4, 1, 9)), left=(1, 0, 0)),
    "two or fewer": Case(lines(asks_for_two_axes), (2, 5, 8), ((5, 8), (8,), (1, 7, 8))),
    "one image alone": Case(two(lone_image), others=((4, 5, 5), (2, 4, 3, 7), (4, 1, 9))),
    "the length of the shape": Case(two(axes_by_length), others=((4, 5, 5), (2, 4, 3, 7))),
    "unpacking": Case(two(axes_by_unpacking), others=((4, 5, 5), (2, 4, 3, 7))),
    "tokens with and without a batch": Case(lines(sides_by_axes), (2, 5, 8), ((5, 8), (2, 3, 4, 8), (1, 7, 8))),
}


# Instances that differ from their classes


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class Clipped(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight.clamp(-0.2, 0.2), bias, self.stride, self.padding)


def absolute(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight.abs(), norm.bias, eps=norm.eps)


def shifted(conv, x):
    return F.conv2d(F.pad(x, (2, 0, 1, 1)), conv.weight, conv.bias)


def wrapped(conv, x):
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias)


class Patched(nn.Module):
    """``place`` has another forward on the instance."""

    def __init__(self, place, forward):
        super().__init__()
        self.a, self.b, self.n, self.place = conv(3), conv(1), norm(), place
        self.get_submodule(place).forward = types.MethodType(forward, self.get_submodule(place))

    def forward(self, x):
        return self.n(self.a(x) + self.b(x))


def summed(m, x):
    return m.n(m.a(x) + m.b(x))


def in_a_row(m, x):
    return m.n(m.a(x))


PATCHED = {
    "a norm, on the instance": Case(lambda: Patched("n", absolute)),
    "a convolution that shifts, on the instance": Case(lambda: Patched("a", shifted)),
    "a convolution that wraps, on the instance": Case(lambda: Patched("a", wrapped)),
    "a norm, in a class": Case(lambda: Net(in_a_row, a=conv(3), n=Doubled(4))),
    "a convolution, in a class": Case(lambda: Net(summed, a=Clipped(4, 4, 3, padding=1), b=conv(1), n=norm())),
}


# Weights that forward writes


def halves_its_data(m, x):
    m.a.weight.data = m.a.weight.data / 2
    return m.n(m.a(x))


def clamps_in_place(m, x):
    m.a.weight.data.clamp_(-0.1, 0.1)
    return m.n(m.a(x))


def scales_without_gradients(m, x):
    with torch.no_grad():
        m.a.weight.mul_(0.9)
    return m.n(m.a(x)) + m.b(x)


def zeroes_a_part(m, x):
    with torch.no_grad():
        m.a.weight[:, 0] = 0
        m.a.weight[..., 1, 1] += 0.1
    return m.n(m.a(x))


def copies_over(m, x):
    with torch.no_grad():
        m.b.weight.copy_(m.a.weight[..., 1:2, 1:2])
    return m.a(x) + m.b(x)


def writes_statistics(m, x):
    m.n.running_mean.mul_(0.5).add_(x.mean((0, 2, 3)), alpha=0.5)
    return m.n(m.a(x))


def puts_in_place(m, x):
    m.a.bias = nn.Parameter(-m.a.bias.detach())
    return m.n(m.a(x))


WRITES = [halves_its_data, clamps_in_place, scales_without_gradients, zeroes_a_part, copies_over, writes_statistics,
          puts_in_place]  # fmt: skip


# States


def keeps_a_mean(m, x):
    y = m.n(m.a(x)) + m.mean
    m.mean = (m.mean + y.mean()) / 2
    return y


def keeps_a_mean_in_place(m, x):
    y = m.n(m.a(x)) + m.mean
    m.mean.copy_(y.mean())
    return y


def counts(m, x):
    m.count += 1
    return m.n(m.a(x)) * m.count


def keeps_a_list(m, x):
    m.seen.append(float(x.sum() > 0))
    return m.n(m.a(x)) * sum(m.seen)


def keeps_tensors_in_a_list(m, x):
    m.seen.append(m.n(m.a(x)))
    return torch.stack(m.seen).mean(0)


def keeps_the_input(m, x):
    y = m.a(x) + m.b(m.last if m.last is not None and m.last.shape == x.shape else x)
    m.last = x
    return y


def keeps_by_shape(m, x):
    key = tuple(x.shape)
    if key not in m.table:
        m.table[key] = torch.full(x.shape[2:], float(len(m.table) + 1), dtype=x.dtype)
    return m.n(m.a(x)) * m.table[key]


def alternates(m, x):
    m.odd = not m.odd
    return m.a(x) if m.odd else m.a(x) + m.b(x)


def sets_on_a_child(m, x):
    m.a.scale = getattr(m.a, "scale", 1.0) * 2
    return m.n(m.a(x)) * m.a.scale


class Limited(nn.Module):
    """Returns no more than its limit, which what calls it may set: far above what an example has."""

    def __init__(self):
        super().__init__()
        self.limit, self.mask, self.settings = 1e9, None, {"limit": 1e9}

    def forward(self, x):
        x = x if self.mask is None else x.clamp(max=self.mask)
        return x.clamp(-self.limit, min(self.limit, self.settings["limit"]))


def clipped(_module, _given, y):
    return y.clamp(-50, 50)


def sets_a_limit(m, x):
    m.q.limit = 50.0
    y = m.q(m.a(x) + m.b(x))
    m.q.limit = 1e9
    return y


def sets_a_limit_by_turns(m, x):
    y = m.a(x) + m.b(x)
    for m.q.limit in (1e9, 50.0):
        y = m.q(y) * 2
    m.q.limit = 1e9
    return y


def sets_a_limit_in_a_dict(m, x):
    m.q.settings["limit"] = 50.0
    y = m.q((m.a(x) + m.b(x)).relu())
    m.q.settings["limit"] = 1e9
    return y


def sets_a_mask(m, x):
    m.q.mask = x.amax((2, 3), keepdim=True) * 0 + 50
    y = m.q((m.a(x) + m.b(x)).relu())
    m.q.mask = None
    return y


def sets_a_limit_of_pytorchs(m, x):
    m.t.max_val = 50.0
    y = m.t(m.a(x) + m.b(x))
    m.t.max_val = 1e9
    return y


def hangs_a_hook(m, x):
    hook = m.d.register_forward_hook(clipped)
    y = m.d((m.a(x) + m.b(x)).relu())
    hook.remove()
    return y


def hangs_a_hook_for_good(m, x):
    if not m.d._forward_hooks:
        m.d.register_forward_hook(clipped)
    return m.d((m.a(x) + m.b(x)).relu())


def exchanges_a_forward(m, x):
    m.d.forward = lambda x: type(m.d).forward(m.d, x).clamp(-50, 50)
    y = m.d((m.a(x) + m.b(x)).relu())
    del m.d.forward
    return y


SETTING = [sets_a_limit, sets_a_limit_by_turns, sets_a_limit_in_a_dict, sets_a_mask, sets_a_limit_of_pytorchs,
           hangs_a_hook, hangs_a_hook_for_good, exchanges_a_forward]  # fmt: skip


class Tells(nn.Module):
    """Tells what calls it something of what it is given, or keeps it."""

    def __init__(self, what):
        super().__init__()
        self.what, self.kept = what, None

    def forward(self, x):
        return self.what(x)


class Keeps(Tells):
    def forward(self, x):
        self.kept = self.what(x)
        return x


def long(x):
    return x.shape[2] > 300


def doubles_where_told(m, x):
    y = m.a(x) + m.b(x)
    return y * 2 if m.c(x) else y


def doubles_where_kept(m, x):
    x = m.c(x)
    return (m.a(x) + m.b(x)) * (2.0 if m.c.kept else 1.0)


def adds_what_it_is_told(m, x):
    y = m.a(x) + m.b(x)
    return sum(m.c(x), y)


def doubles_by_name(m, x):
    y = m.a(x) + m.b(x)
    return y * 2 if "long" in m.c(x) else y


def multiplied_by_its_size(m, x):
    return (m.a(x) + m.b(x)) * m.c(x).shape[0]


TOLD_BY_SIZE = {
    "yes or no": (doubles_where_told, Tells, long),
    "a number": (doubles_where_told, Tells, lambda x: int(x.shape[2]) // 300),
    "kept": (doubles_where_kept, Keeps, long),
    "a list": (adds_what_it_is_told, Tells, lambda x: [x, x] if long(x) else [x]),
    "a dict": (doubles_by_name, Tells, lambda x: {"long": x} if long(x) else {"short": x}),
    "a tensor of another size": (multiplied_by_its_size, Tells, lambda x: x.new_ones(2 if long(x) else 1)),
}
TOLD_BY_VALUE = {
    "yes or no": (doubles_where_told, Tells, lambda x: bool((x > 100).any())),
    "nothing or something": (doubles_where_told, Tells, lambda x: 1 if x.max() > 100 else None),
    "a text": (doubles_by_name, Tells, lambda x: "long" if x.max() > 100 else "short"),
    "a list": (adds_what_it_is_told, Tells, lambda x: [x] if x.max() > 100 else []),
    "kept": (doubles_where_kept, Keeps, lambda x: bool(x.max() > 100)),
}


def seldom(count):
    """Something that a forward counts, and takes account of after two calls alone."""

    def forward(m, x):
        y = m.n(m.a(x))
        return y * (2.0 if count(m) > 2 else 1.0)

    forward.__name__ = count.__name__
    return forward


@seldom
def counts_in_a_private_list(m):
    m._seen.append(1)
    return len(m._seen)


@seldom
def counts_in_a_list_in_a_dict(m):
    m.nested["seen"].append(1)
    return len(m.nested["seen"])


@seldom
def counts_in_an_object(m):
    m.space.count += 1
    return m.space.count


@seldom
def counts_in_an_empty_object(m):
    m.blank.count = getattr(m.blank, "count", 0) + 1
    return m.blank.count


@seldom
def counts_in_a_queue(m):
    m.queue.append(1)
    return len(m.queue)


@seldom
def counts_in_a_counter(m):
    m.counter["calls"] += 1
    return m.counter["calls"]


@seldom
def counts_in_an_array(m):
    m.array += 1
    return m.array[0]


@seldom
def counts_in_an_own_object(m):
    return m.tick()


@seldom
def counts_on_what_is_not_called(m):
    m.b.count = getattr(m.b, "count", 0) + 1
    return m.b.count


class Ticking:
    """Counts its calls."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return self.count


def stateful():
    held = {"mean": torch.zeros(()), "count": 0, "seen": [], "last": None, "table": {}, "odd": False}
    objects = {"_seen": [], "nested": {"seen": []}, "space": types.SimpleNamespace(count=0), "queue": deque()}
    objects["blank"] = types.SimpleNamespace()
    others = {"counter": Counter(), "array": np.zeros(1), "tick": Ticking()}
    return {"a": conv(3), "b": conv(1), "n": norm(), **held, **objects, **others}


STATES = [keeps_a_mean, keeps_a_mean_in_place, counts, keeps_a_list, keeps_tensors_in_a_list, keeps_the_input,
          keeps_by_shape, alternates, sets_on_a_child, counts_in_a_private_list, counts_in_a_list_in_a_dict,
          counts_in_an_object, counts_in_an_empty_object, counts_in_a_queue, counts_in_a_counter, counts_in_an_array,
          counts_in_an_own_object, counts_on_what_is_not_called]  # fmt: skip


class OfClass(Net):
    """A state of all its objects: a number, a list, and one in a method."""

    count, seen = 0, list[int]()

    def tally(self, seen=[]):  # noqa: B006
        seen.append(1)
        return len(seen)


SEEN, CALLS = list[int](), 0


def counts_in_its_class(m):
    OfClass.count += 1
    return OfClass.count


def lists_in_its_class(m):
    OfClass.seen.append(1)
    return len(OfClass.seen)


def counts_in_its_file(m):
    global CALLS  # noqa: PLW0603
    CALLS += 1
    return CALLS


def lists_in_its_file(m):
    SEEN.append(1)
    return len(SEEN)


def counts_in_a_function(m):
    counts_in_a_function.calls = getattr(counts_in_a_function, "calls", 0) + 1
    return counts_in_a_function.calls


def lists_in_a_default(m):
    return OfClass.tally(m)


OUTSIDE = [counts_in_its_class, lists_in_its_class, counts_in_its_file, lists_in_its_file, lists_in_a_default,
           counts_in_a_function]  # fmt: skip


# Autocast


def all_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.n(m.a(x) + m.b(x))


def one_branch_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.a(x)
    return m.n(y.float() + m.b(x))


def without_autocast_inside(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.b(x)
        with torch.autocast("cpu", enabled=False):
            return m.n(m.a(y.float()) + m.b(y.float()))


@torch.autocast("cpu", torch.bfloat16)
def decorated_autocast(m, x):
    return m.a(x) + m.b(x)


def autocast_around_a_block(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.inner(x)


AUTOCAST = {
    "around all": Case(lambda: Net(all_autocast, a=conv(3), b=conv(1), n=norm()), dtype=torch.float32),
    "around a branch": Case(lambda: Net(one_branch_autocast, a=conv(3), b=conv(1), n=norm()), dtype=torch.float32),
    "off inside": Case(lambda: Net(without_autocast_inside, a=conv(3), b=conv(1), n=norm()), dtype=torch.float32),
    "a decorator": Case(two(decorated_autocast), dtype=torch.float32),
    "around a block": Case(
        lambda: Net(autocast_around_a_block, inner=Net(summed, a=conv(3), b=conv(1), n=norm())), dtype=torch.float32
    ),
}


# Outer forwards that walk modules and decide by values


def walks_children(m, x):
    for child in m.layers.children():
        x = child(x)
        if x.abs().max() > 1e6:
            break
    return x


def walks_backwards(m, x):
    for index in reversed(range(len(m.layers))):
        x = torch.relu(m.layers[index](x))
    return x if x.mean() > -1 else x * 2


def walks_with_skips(m, x):
    kept = [x]
    for layer in m.layers:
        kept.append(torch.tanh(layer(kept[-1])))
    total = kept[-1] + kept[1]
    return total * 2 if bool((total > 9).any()) else total


def picks_by_name(m, x):
    for name, layer in m.layers.named_children():
        x = torch.relu(layer(x)) if name != "0" or x.sum() > 0 else -layer(x)
    return x


def pairs_of_layers(m, x):
    for one, other in pairwise(m.layers):
        x = torch.relu(one(x)) + torch.relu(other(x))
    return x if x.isfinite().all() else torch.zeros_like(x)


def three(run):
    layers = lambda: nn.Sequential(conv_norm(3), conv_norm(1), conv_norm(3))  # noqa: E731
    return lambda: Net(run, layers=layers())


WALKS = {
    "children until one is large": Case(three(walks_children), left=(3, 0, 0)),
    "backwards": Case(three(walks_backwards), left=(3, 0, 0)),
    "with skips": Case(three(walks_with_skips), left=(3, 0, 1)),
    "by name": Case(three(picks_by_name), left=(3, 0, 0)),
    "pairs": Case(three(pairs_of_layers), left=(4, 0, 2)),
}


# Stock modules made in forward


def makes_activations(m, x):
    return nn.ReLU()(m.n(nn.ReLU(inplace=True)(m.a(x) + m.b(x))))


def makes_padding(m, x):
    return m.n(m.a(nn.ZeroPad2d(1)(x)))


def makes_upsampling(m, x):
    return nn.Upsample(scale_factor=2)(m.n(m.a(x))) + nn.Identity()(x).mean()


def makes_a_convolution(m, x):
    made = nn.Conv2d(4, 4, 1, bias=False)
    made.weight = m.b.weight
    return m.a(x) + made(x)


def makes_a_row(m, x):
    return nn.Sequential(m.a, m.n, nn.Sigmoid())(x)


MADE = {
    "activations": Case(lambda: Net(makes_activations, a=conv(3), b=conv(1), n=norm()), left=(1, 1, 0)),
    "padding": Case(lambda: Net(makes_padding, a=conv(3, padding=0), n=norm()), left=(1, 0, 0)),
    "upsampling": Case(lambda: Net(makes_upsampling, a=conv(3), n=norm()), left=(1, 0, 1)),
    "a convolution": Case(two(makes_a_convolution)),
    "a row": Case(lambda: Net(makes_a_row, a=conv(3), n=norm()), left=(1, 0, 0)),
}


# One activation object in all blocks

SWISH = nn.Hardswish()


def activated(m, x):
    return m.act(m.n(m.a(x)) + m.b(x))


def activated_twice(m, x):
    return m.act(m.n(m.a(m.act(x))) + m.b(m.act(x)))


def activated_from_a_list(m, x):
    return m.acts[0](m.n(m.a(x)) + m.b(x))


def sharing(run, **members):
    block = lambda: Net(run, a=conv(3, bias=False), n=norm(), b=conv(1), **members)  # noqa: E731
    return lambda: nn.Sequential(block(), block())


SHARED = {
    "after each sum": Case(sharing(activated, act=SWISH), left=(2, 0, 0)),
    "before and after": Case(sharing(activated_twice, act=SWISH)),
    "in a list": Case(sharing(activated_from_a_list, acts=[SWISH]), left=(2, 0, 0)),
}


# Padding by integer arithmetic


def pads_like_tensorflow(m, x):
    height, width = x.shape[-2:]
    down = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
    right = max((math.ceil(width / 2) - 1) * 2 + 3 - width, 0)
    return m.n(m.a(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))))


class Same(nn.Conv2d):
    """Pads by what the stride leaves, as layers ported from tensorflow do."""

    def forward(self, input):
        height, width = input.size()[-2:]
        down = max((math.ceil(height / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        right = max((math.ceil(width / self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        if down > 0 or right > 0:
            input = F.pad(input, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(input, self.weight, self.bias, self.stride)


def pads_where_needed(m, x):
    down, right = -x.shape[2] % 4, -x.shape[3] % 4
    if down or right:
        x = F.pad(x, (0, right, 0, down))
    return torch.relu(m.n(m.a(x)))


def pads_and_crops(m, x):
    height, width = x.shape[2:]
    y = F.pad(x, (0, (4 - width % 4) % 4, 0, (4 - height % 4) % 4))
    return m.n(m.a(y))[..., :height, :width]


def pads_by_int(m, x):
    missing = int(x.shape[-1]) % 2
    return m.a(F.pad(x, (0, missing, 0, 0))) + m.b(F.pad(x, (0, missing, 0, 0)))


SIDES = ((1, 4, 8, 8), (1, 4, 9, 7), (2, 4, 3, 5), (1, 4, 13, 16))
PADDED = {
    "as tensorflow does": Case(lambda: Net(pads_like_tensorflow, a=conv(3, stride=2, padding=0), n=norm()),
                               others=SIDES),
    "in a layer": Case(lambda: Net(in_a_row, a=Same(4, 4, 3, 2), n=norm()), others=SIDES),
    "in a layer of stride 1": Case(lambda: Net(in_a_row, a=Same(4, 4, 3), n=norm()), others=SIDES),
    "where needed": Case(lambda: Net(pads_where_needed, a=conv(3), n=norm()), (1, 4, 8, 8), ((1, 4, 6, 6), *SIDES)),
    "where needed, and it is": Case(lambda: Net(pads_where_needed, a=conv(3), n=norm()), (1, 4, 6, 6), SIDES),
    "and a crop": Case(lambda: Net(pads_and_crops, a=conv(3), n=norm()), (1, 4, 8, 8), ((1, 4, 6, 6), *SIDES)),
    "by int": Case(two(pads_by_int), (1, 4, 6, 8), SIDES),
}  # fmt: skip


# Frozen norms in arithmetic


def frozen(m, x):
    scale = m.weight / (m.var + 1e-5).sqrt()
    return m.a(x) * scale[:, None, None] + (m.bias - m.mean * scale)[:, None, None]


def frozen_in_steps(m, x):
    mean, var = m.mean.view(1, -1, 1, 1), m.var.view(1, -1, 1, 1)
    return (m.a(x) - mean) / torch.sqrt(var + 1e-3) * m.weight.view(-1, 1, 1) + m.bias.view(-1, 1, 1)


def frozen_of_a_sum(m, x):
    scale = (m.weight * (m.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
    return torch.relu((m.a(x) + m.b(x)) * scale + (m.bias.reshape(1, -1, 1, 1) - m.mean.reshape(1, -1, 1, 1) * scale))


def arithmetic(run):
    kept = lambda: {name: torch.rand(4) + 0.5 for name in ("weight", "bias", "mean", "var")}  # noqa: E731
    return lambda: Net(run, a=conv(3, bias=False), b=conv(1), **kept())


FROZEN = {
    "at once": Case(arithmetic(frozen), left=(1, 0, 0)),
    "in steps": Case(arithmetic(frozen_in_steps), left=(1, 0, 0)),
    "of a sum": Case(arithmetic(frozen_of_a_sum), left=(1, 0, 0)),
}


# Arguments


class Masked(nn.Module):
    """A sum with options."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def forward(self, x, mask=None, scale=1.0, *, act=True):
        y = self.a(x) + self.b(x)
        if mask is not None:
            y = y * mask
        return (torch.relu(y) if act else y) * scale


class Scales(Masked):
    """The options come in a dict beside the tensor."""

    def forward(self, given):
        return torch.relu(self.a(given["x"]) + self.b(given["x"])) * given.get("scale", 1.0)


class Second(Masked):
    """A tuple, whose second is None or not."""

    def forward(self, given):
        x, other = given
        y = torch.relu(self.a(x) + self.b(x))
        return y if other is None else y + other


class Both(Masked):
    """Two tensors, which may be the same."""

    def forward(self, x, y):
        return torch.relu(self.a(x) + self.b(y))


def none_by_keyword(m, x):
    return m.inner(x, mask=None) if x.sum() > -1e9 else x


def none_by_position(m, x):
    return m.inner(x, None, 2.0)


def a_mask_by_keyword(m, x):
    return m.inner(x, mask=x > 0, act=False)


def other_settings(m, x):
    return m.inner(torch.tanh(m.inner(x, scale=2.0)), scale=3.0)


def a_scale_of_the_input(m, x):
    return m.inner(x, scale=x.shape[2])


def a_scale_by_values(m, x):
    return m.inner(x, scale=1.0 if x.sum() > 0 else -1.0)


def a_mask_by_values(m, x):
    return m.inner(x, mask=None if x.sum() > 0 else x)


def a_dict(m, x):
    return m.inner({"x": x})


def a_dict_by_values(m, x):
    return m.inner({"x": x, "scale": 1.0 if x.sum() > 0 else -1.0})


def a_dict_by_size(m, x):
    return m.inner({"x": x, "scale": x.shape[3]})


def a_pair(m, x):
    return m.inner((x, None))


def a_pair_by_values(m, x):
    return m.inner((x, None if x.sum() > 0 else x))


def one_tensor_twice_by_values(m, x):
    return m.inner(x, x if x.sum() > 0 else x * 2)


def within(run, kind=Masked):
    return lambda: Net(run, inner=kind())


ARGUMENTS = {
    "None by keyword": Case(within(none_by_keyword), left=(1, 0, 0)),
    "None and a number by position": Case(within(none_by_position), left=(1, 0, 0)),
    "a tensor by keyword": Case(within(a_mask_by_keyword), left=(1, 0, 0)),
    "other numbers each time": Case(within(other_settings)),
    "a size": Case(within(a_scale_of_the_input)),
    "a dict": Case(within(a_dict, Scales), left=(1, 0, 0)),
    "a dict with a size": Case(within(a_dict_by_size, Scales)),
    "a pair with None": Case(within(a_pair, Second), left=(1, 0, 0)),
}
BY_VALUES = {
    "a number": within(a_scale_by_values),
    "a tensor or None": within(a_mask_by_values),
    "a number in a dict": within(a_dict_by_values, Scales),
    "None in a pair": within(a_pair_by_values, Second),
    "one tensor twice": within(one_tensor_twice_by_values, Both),
}


# Kernels built in forward


def central_difference(m, x):
    w = m.a.weight
    return m.a(x) - 0.7 * F.conv2d(x, w.sum((2, 3), keepdim=True))


def written_into_zeros(m, x):
    kernel = torch.zeros_like(m.a.weight)
    kernel[:, :, 1, 1] = m.b.weight[:, :, 0, 0]
    kernel[:, :, 0] += 0.1
    return m.a(x) + F.conv2d(x, kernel, m.b.bias, padding=1)


def padded_kernel(m, x):
    kernel = m.a.weight + F.pad(m.b.weight, [1, 1, 1, 1]) + torch.eye(4, dtype=x.dtype)[:, :, None, None]
    return F.conv2d(x, kernel, m.a.bias + m.b.bias, padding=m.a.weight.shape[-1] // 2)


def flipped_kernel(m, x):
    return m.a(x) + F.conv2d(x, torch.flip(m.a.weight, (-1,)), padding=1)


def outer_kernel(m, x):
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    kernel = (torch.outer(line, line) / 16).expand(4, 1, 3, 3)
    return m.b(x) + F.conv2d(x, kernel, padding=1, groups=x.shape[1])


def kernel_of_the_input(m, x):
    return m.a(x) + F.conv2d(x, m.b.weight * x.mean())


KERNELS = {
    "central differences": Case(two(central_difference), left=(1, 0, 0)),
    "written into zeros": Case(two(written_into_zeros)),
    "padded": Case(two(padded_kernel)),
    "flipped": Case(two(flipped_kernel), left=(1, 0, 0)),
    "an outer product": Case(two(outer_kernel)),
    "scaled by the input": Case(two(kernel_of_the_input)),
}


# Images as they come, brought to what a first layer expects


MEANS, SPREADS = [0.4, 0.5, 0.6, 0.1], [0.2, 0.3, 0.25, 2.0]


def by_buffers_of_its_type(m, x):
    return m.b((x - m.mean.type_as(x)) / m.spread.to(x))


def by_a_state_of_its_type(m, x):
    m.kept = m.kept.type_as(x)
    return m.b((x - m.kept) * 255.0)


def by_new_tensors(m, x):
    mean, spread = x.new_tensor(MEANS), x.new_tensor(SPREADS, dtype=x.dtype)
    return m.b((x - mean[:, None, None]) / spread.view(-1, 1, 1) * x.new_full((1,), 0.5) * x.new_ones(1))


def as_torchvision_does(m, x):
    if x.ndim < 3:
        raise ValueError(x.shape)
    x = x.clone()
    mean, spread = (torch.as_tensor(each, dtype=x.dtype, device=x.device) for each in (MEANS, SPREADS))
    if (spread == 0).any():
        raise ValueError(SPREADS)
    mean = mean.view(-1, 1, 1) if mean.ndim == 1 else mean
    return m.b(x.sub_(mean).div_(spread.view(-1, 1, 1)))


def of_bytes(m, x):
    return m.b(x.double().div_(255).sub_(m.mean).div_(m.spread))


def shifted_before_a_border(m, x):
    """The mean stays, since beyond the border is 0 and not the mean; what it is divided by does not."""
    return m.a((x - m.mean) / m.spread)


IMAGES = {
    by_buffers_of_its_type: 0, by_a_state_of_its_type: 0, by_new_tensors: 0, as_torchvision_does: 0, of_bytes: 0,
    shifted_before_a_border: 1,
}  # fmt: skip


@pytest.mark.parametrize("forward", IMAGES, ids=lambda forward: forward.__name__)
def test_what_brings_an_image_to_a_first_layer_goes_into_that(forward):
    mean, spread = (torch.tensor(each, dtype=torch.float64).view(1, 4, 1, 1) for each in (MEANS, SPREADS))
    model = Net(forward, a=conv(3), b=conv(1), mean=mean, spread=spread)
    model.kept = mean.clone()
    model = randomised(model)
    model.mean, model.spread = mean, spread
    images = [(image(2, 4, *side, seed=5).abs() * 99).byte() for side in ((6, 6), (9, 7), (1, 12))]
    given = images if forward is of_bytes else [x.double() for x in images]
    fused = fuse(copy.deepcopy(model), (given[0],)).module
    for x in given:
        expected = model(x)
        assert (expected - fused(x)).abs().max() <= 1e-12 * expected.abs().max()
    seen = operations(fused, given[0])
    left = sum(seen[kind] for kind in ("sub", "sub_", "div", "div_", "mul", "add", "rsub"))
    assert (left, seen["convolution"]) == (IMAGES[forward], 1), seen


def overwritten_by_one_branch(m, x):
    """The first branch writes where the other reads."""
    y = m.a(x)
    return m.b(y.mul_(2.0)) + m.n(y)


def overwritten_by_what_stays(m, x):
    y = m.a(x)
    view = y.view(-1)
    z = F.gelu(y.mul_(2.0))
    return m.b(z) + view.view(y.shape)


@pytest.mark.parametrize("forward", [overwritten_by_one_branch, overwritten_by_what_stays])
def test_what_a_branch_writes_for_others_is_not_taken_from_them(forward):
    check(Case(lambda: Net(forward, a=conv(3), b=conv(1), n=norm())))


# Settings read off the input


def groups_of_channels(m, x):
    return m.a(x) + F.conv2d(x, m.w, padding=1, groups=x.shape[1])


def groups_of_channels_and_scale(m, x):
    _, c, *space = x.shape
    return (m.a(x) + F.conv2d(x, m.w, padding=len(space) // 2, groups=c)) * c


def ones_like_the_input(m, x):
    return m.n(m.a(x) * torch.ones(1, dtype=x.dtype, device=x.device) + m.a(x).new_zeros(1))


def weights_like_the_input(m, x):
    return m.a(x) + F.conv2d(x, m.w.to(x), None, 1, m.w.size(-1) // 2, groups=m.w.size(0))


def stride_of_the_size(m, x):
    return F.conv2d(x, m.w, stride=1 + x.shape[2] // 8, padding=1, groups=4) * 2


def padding_of_the_size(m, x):
    return m.n(F.conv2d(x, m.w, padding=x.shape[2] // 6, groups=4))


def mean_over_sizes(m, x):
    return (m.n(m.a(x)) / (x.shape[2] * x.shape[3])).sum((2, 3))


def deep(run):
    return lambda: Net(run, a=conv(3, groups=4), n=norm(), w=nn.Parameter(torch.empty(4, 1, 3, 3)))


SETTINGS = {
    "groups": Case(deep(groups_of_channels), left=(1, 0, 0)),
    "groups and a scale": Case(deep(groups_of_channels_and_scale)),
    "dtype and device": Case(deep(ones_like_the_input), left=(2, 1, 1)),
    "weights like the input": Case(deep(weights_like_the_input)),
    "stride": Case(deep(stride_of_the_size), others=((1, 4, 8, 8), (1, 4, 17, 5), (2, 4, 3, 3))),
    "padding": Case(deep(padding_of_the_size), others=((1, 4, 12, 8), (1, 4, 5, 5), (2, 4, 30, 3))),
    "a mean": Case(deep(mean_over_sizes), left=(1, 0, 0)),
}

# Forwards that ask what a block is made of


def counts_children(m, x):
    return m.inner(x) * len(list(m.inner.children()))


def asks_for_the_class(m, x):
    return m.inner(x) * (2.0 if isinstance(m.inner, Masked) else 1.0)


def asks_for_a_setting(m, x):
    return m.inner(x) * m.inner.a.kernel_size[0]


ASKED = {
    "its children": Case(within(counts_children)),
    "its class": Case(within(asks_for_the_class)),
    "a setting of a layer in it": Case(within(asks_for_a_setting)),
}

KINDS = {
    "slices": SLICES, "loops": LOOPS, "axes": RANKS, "patched": PATCHED, "autocast": AUTOCAST, "walked": WALKS,
    "made in forward": MADE, "shared activation": SHARED, "padding": PADDED, "frozen norms": FROZEN,
    "arguments": ARGUMENTS, "kernels": KERNELS, "settings": SETTINGS,
    "asked": ASKED,
}  # fmt: skip
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_runs_is_what_is_fused(case):
    check(case)


@pytest.mark.parametrize("large", BY_SIZE, ids=lambda large: large.__name__)
def test_a_branch_on_a_size_stays(large):
    check(Case(functools.partial(BySize, large), others=LONG))


@pytest.mark.parametrize("large", BY_SIZE[::4], ids=lambda large: large.__name__)
def test_a_branch_on_the_size_of_a_value_between_layers_stays(large):
    check(Case(functools.partial(BySizeBetween, large), others=LONG))


@pytest.mark.parametrize("large", BY_SIZE[::3], ids=lambda large: large.__name__)
def test_a_branch_on_a_size_stays_where_the_example_is_large(large):
    check(Case(functools.partial(BySize, large), (1, 4, 300, 2), ((1, 4, 6, 6), (2, 4, 2, 300), (3, 4, 5, 3))))


@pytest.mark.parametrize("large", BEYOND, ids=lambda large: large.__name__)
def test_a_branch_that_no_recorded_size_takes_stays(large):
    check(Case(functools.partial(BySize, large), (1, 4, 64, 64), ((1, 4, 600, 3), (2, 4, 5, 7))))


def test_what_a_subclass_does_in_the_place_of_a_part_of_a_forward_is_seen():
    others = ((1, 4, 17, 17), (2, 4, 5, 5))
    check(Case(lambda: Net(lambda m, x: m.a(x) + m.b(x), a=ConvBySize(4, 4, 3, padding=1), b=conv(1)), others=others))
    check(Case(lambda: nn.Sequential(conv(3), NormBySize(4)), others=others))


@pytest.mark.parametrize("kind", [Passing, PassingFirst])
@pytest.mark.parametrize("name", PASSING)
def test_a_module_that_may_do_something_is_not_passed_by(name, kind):
    check(Case(made_of(kind, PASSING[name]), (1, 4, 64, 64), ((1, 4, 17, 17), (2, 4, 17, 9), (2, 4, 5, 5)), calls=4))


@pytest.mark.parametrize("large", [both_large, all_large, of_that_size, tall_and_wide, large_squares])
def test_a_branch_on_several_sizes_stays(large):
    others = ((1, 4, 130, 130), (2, 4, 70, 70), (1, 4, 64, 17), (2, 4, 5, 5), (1, 4, 9, 70))
    check(Case(functools.partial(BySize, large), (1, 4, 64, 64), others))


@pytest.mark.parametrize("forward", [of_squares_in_pieces, of_squares_in_parts])
def test_what_squares_are_cut_into_is_not_taken_from_the_example(forward):
    check(Case(two(forward), (1, 4, 16, 16), others=((1, 4, 32, 32), (2, 4, 48, 48))))


def test_what_is_made_of_nothing_and_written_into_is_made_in_each_call_of_what_a_file_holds():
    check(Case(two(added_up_in_zeros), left=(1, 0, 1), calls=3))


def test_what_is_drawn_is_drawn_in_each_call_of_what_a_file_holds():
    again = read_again(fuse(network(Case(two(filled_by_chance))), (image(1, 4, 9, 8),)).module)
    assert len({float(again(image(1, 4, 9, 8)).detach().sum()) for _ in range(4)}) == 4 and len(again.state_dict()) == 2


def test_a_network_of_squares_merges():
    def of_squares(m, x):
        n, c, h, w = x.shape
        assert h == w, f"{h} is not {w}"
        return (m.a(x) + m.b(x)).flatten(2).transpose(1, 2).reshape(n, h * w, c)

    check(Case(two(of_squares), (1, 4, 16, 16), others=((1, 4, 32, 32), (2, 4, 5, 5)), left=(1, 0, 0)))


def test_pieces_of_a_length_are_more_at_a_larger_size():
    check(Case(two(in_pieces), (1, 4, 64, 64), ((1, 4, 600, 3), (2, 4, 5, 7))))


def test_some_pieces_are_fewer_at_a_smaller_size():
    check(Case(two(in_three_pieces), others=((1, 4, 2, 3), (2, 4, 7, 7))))


def test_a_size_that_the_next_one_leaves_as_it_is_is_no_number():
    check(Case(two(parted_behind_a_stride), others=((2, 4, 5, 10), (1, 4, 3, 2), (1, 4, 6, 5)), left=(2, 0, 0)))


@pytest.mark.parametrize(
    ("stride", "window", "height", "others"),
    [(4, 3, 9, (12, 21, 24)), (3, 3, 7, (9, 17)), (2, 3, 5, (6, 11)), (8, 7, 56, (50, 112)), (8, 2, 80, (65, 73, 240))],
)
def test_sizes_in_a_row_behind_a_stride_are_no_number(stride, window, height, others):
    shapes = tuple((2, 4, size, 5) for size in others if -(-size // stride) % window == 0)
    assert len(shapes) > 1
    check(Case(two(in_windows(stride, window)), (1, 4, height, 6), others=shapes, left=(1, 0, 0)))


def test_a_branch_that_fails_later_may_not_fail_elsewhere():
    check(Case(two(halved_while_large), others=((2, 4, 40, 40), (1, 4, 300, 300), (2, 4, 5, 7))))


def test_what_a_forward_refuses_at_once_is_no_branch():
    def insists(m, x):
        assert x.shape[2] < 1000, f"{x.shape[2]} is too much"
        return m.a(x) + m.b(x)

    check(Case(two(insists), left=(1, 0, 0)))


@pytest.mark.parametrize("forward", WRITES, ids=lambda forward: forward.__name__)
def test_a_weight_that_forward_writes_is_no_constant(forward):
    check(Case(lambda: Net(forward, a=conv(3), b=conv(1), n=norm()), calls=3))


@pytest.mark.parametrize("forward", SETTING, ids=lambda forward: forward.__name__)
def test_what_a_forward_sets_on_what_it_calls_holds_in_the_call(forward):
    """Also where it puts it back, and where the example tells nothing of it."""
    parts = {"a": conv(3), "b": conv(1), "d": conv(1), "q": Limited(), "t": nn.Hardtanh(-1e9, 1e9)}
    model, x = randomised(Net(forward, **parts)), image(1, 4, 6, 6)
    fused = fuse(copy.deepcopy(model), (x,)).module
    for given in (x, 1000 * x, -1000 * x, 1000 * image(3, 4, 9, 5)):
        with torch.no_grad():
            assert (model(given) - fused(given)).abs().max() < 1e-9


def returns_sizes(m, x):
    return {"y": m.a(x) + m.b(x), "size": x.shape[-2:]}


def returns_a_shape(m, x):
    y = m.a(x) + m.b(x)
    return y, [y.shape]


@pytest.mark.parametrize("forward", [returns_sizes, returns_a_shape])
def test_the_shape_that_a_forward_returns_stays_one(forward):
    model, x = Net(forward, a=conv(3), b=conv(1)), image(1, 4, 6, 6)
    found, wanted = fuse(randomised(model), (x,), keep_class=False).module(x), model(x)
    assert repr(tree_map_only(Tensor, lambda x: x.shape, found)) == repr(
        tree_map_only(Tensor, lambda x: x.shape, wanted)
    )


def test_a_forward_that_fails_at_other_sizes_leaves_the_default_dtype():
    def forward(m, x):
        before = torch.get_default_dtype()
        torch.set_default_dtype(x.dtype)
        y = (m.a(x) + m.b(x)).reshape(1, 4, 6, 6)
        torch.set_default_dtype(before)
        return y

    fuse(randomised(Net(forward, a=conv(3), b=conv(1))), (image(1, 4, 6, 6),))
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("warm", [False, True], ids=["before any call", "after a call"])
def test_what_is_set_to_another_number_at_other_sizes_is_a_state(warm):
    def by_the_batch(m, x):
        m.q.limit = 50.0 * x.shape[0]
        return m.q((m.a(x) + m.b(x)).relu())

    model, x = randomised(Net(by_the_batch, a=conv(3), b=conv(1), q=Limited())), image(2, 4, 6, 6)
    given = 1000 * image(7, 4, 6, 6)
    with torch.no_grad():
        if warm:
            model(x)
        fused = fuse(copy.deepcopy(model), (x,)).module
        assert model(given).max() == 350 and (model(given) - fused(given)).abs().max() < 1e-9


@pytest.mark.parametrize(("forward", "kind", "what"), TOLD_BY_SIZE.values(), ids=TOLD_BY_SIZE.keys())
def test_what_a_module_tells_of_a_size_is_no_constant_of_what_calls_it(forward, kind, what):
    others = ((1, 4, 400, 3), (2, 4, 9, 7), (2, 4, 301, 2))
    check(Case(lambda: Net(forward, a=conv(3), b=conv(1), c=kind(what)), (1, 4, 64, 64), others))


@pytest.mark.parametrize(("forward", "kind", "what"), TOLD_BY_VALUE.values(), ids=TOLD_BY_VALUE.keys())
def test_what_a_module_tells_of_a_value_is_no_constant_of_what_calls_it(forward, kind, what):
    model, x = randomised(Net(forward, a=conv(3), b=conv(1), c=kind(what))), image(1, 4, 6, 6)
    fused = fuse(copy.deepcopy(model), (x,)).module
    for given in (x, 1000 * x, x, 1000 * image(2, 4, 9, 5)):
        with torch.no_grad():
            assert (model(given) - fused(given)).abs().max() < 1e-9


def cut(m, x):
    y = (m.a(x) + m.b(x))[:, :, :60]
    return y * y.shape[2]


def cut_from_the_end(m, x):
    y = (m.a(x) + m.b(x))[:, :, -60:]
    n, c, h, w = y.shape
    return y.reshape(n, c * h, w)


def cut_into_two(m, x):
    y, _ = (m.a(x) + m.b(x)).tensor_split([60], 2)
    return y * y.shape[2]


def cut_far_away(m, x):
    y = (m.a(x) + m.b(x))[:, :, 230:]
    return torch.cat([y, y.new_zeros(y.shape[0], 4, 1 + y.shape[2], y.shape[3])], 2)


@pytest.mark.parametrize("forward", [cut, cut_from_the_end, cut_into_two, cut_far_away])
def test_a_length_that_a_value_is_cut_to_is_no_size(forward):
    check(Case(two(forward), (1, 4, 224, 64), ((1, 4, 40, 9), (2, 4, 7, 64), (1, 4, 300, 30), (1, 4, 59, 3))))


def pooled_by_64(m, x):
    y = m.a(x) + m.b(x)
    for _ in range(6):
        y = F.max_pool2d(y, 3, 2, 1)
    return y.sum((2, 3)) / (y.shape[2] * y.shape[3])


def taken_by_hundreds(m, x):
    y = m.a(x) + m.b(x)
    return y * y[:, :, ::100].shape[2]


def pieces_of_a_hundred(m, x):
    return torch.unsafe_split(m.a(x) + m.b(x), 100, 2)[-1]


@pytest.mark.parametrize("forward", [pooled_by_64, taken_by_hundreds, pieces_of_a_hundred])
def test_as_many_pixels_at_all_small_sizes_are_more_at_large_ones(forward):
    check(Case(two(forward), (1, 4, 64, 32), ((2, 4, 160, 96), (1, 4, 333, 40), (2, 4, 8, 8), (1, 4, 128, 70))))


@pytest.mark.parametrize("forward", STATES, ids=lambda forward: forward.__name__)
def test_a_state_is_kept_from_call_to_call(forward):
    check(Case(lambda: Net(forward, **stateful()), calls=4))


@pytest.mark.parametrize("count", OUTSIDE, ids=lambda count: count.__name__)
def test_a_state_outside_of_the_network_goes_on_changing(count):
    class Block(OfClass):
        def forward(self, x):
            return (self.a(x) + self.b(x)) * (1 if count(self) else 0)

    model = randomised(nn.Sequential(Block(None, a=conv(3), b=conv(1)), nn.ReLU(), RepVGG()))
    made = plan(model, (image(1, 4, 6, 6),))
    assert [site.owner for site in made.sites] == ["2"]
    fused, before = rewrite(model, made), count(None)
    fused(image(1, 4, 6, 6))
    assert count(None) == before + 2


def test_a_warning_is_no_state():
    def warns(m, x):
        warnings.warn("not again", UserWarning, stacklevel=1)
        return m.a(x) + m.b(x)

    with warnings.catch_warnings():
        warnings.simplefilter("once")
        assert plan(randomised(two(warns)()), (image(1, 4, 6, 6),)).sites


@pytest.mark.parametrize("make", BY_VALUES.values(), ids=BY_VALUES.keys())
def test_an_argument_that_depends_on_values_is_not_ignored(make):
    """Where a block insists on the argument that it had, it says so."""
    model = randomised(make())
    x = image(1, 4, 6, 6).abs()
    fused = fuse(model, (x,)).module
    with torch.no_grad():
        for other in (x, -x, x * 2, -x[..., 1:]):
            try:
                found = fused(other)
            except (AssertionError, TypeError):
                assert other is not x
            else:
                assert float((found - model(other)).abs().max()) < 1e-9
