"""What puts rows elsewhere, or averages them: which operators do, and which only look like it."""

from __future__ import annotations

import pytest
import torch
from blocks import C, Spelled, conv, norm
from blocks.building import scale
from support.agreement import error, image, operations, randomised
from support.meanings import meaning_at
from torch import nn
from torch.nn import functional as F

from repfuse.fusing import fuse
from repfuse.ops.meaning import Rearranged, Same

TOKENS, IMAGES = [(2, 5, 4), (3, 7, 4), (1, 1, 4)], [(2, 4, 6, 7), (1, 4, 3, 5)]


@pytest.mark.parametrize(
    ("shapes", "function", "moves"),
    [
        (TOKENS, lambda m, x, y: x.flatten(0, 1), ((2, 1),)),
        (TOKENS, lambda m, x, y: x.view(-1, 4), ((2, 1),)),
        (TOKENS, lambda m, x, y: x.reshape(-1, x.shape[-1]), ((2, 1),)),
        (TOKENS, lambda m, x, y: x.view_as(y.flatten(0, 1)), ((2, 1),)),
        (TOKENS, lambda m, x, y: x.transpose(1, 2), ((1, 2), (2, 1))),
        (TOKENS, lambda m, x, y: x.permute(1, 0, 2), ((2, 2),)),
        (TOKENS, lambda m, x, y: x.mT, ((1, 2), (2, 1))),
        (TOKENS, lambda m, x, y: x.movedim(-1, 1), ((1, 2), (2, 1))),
        (TOKENS, lambda m, x, y: torch.moveaxis(x, (0, 1), (1, 0)), ((2, 2),)),
        (TOKENS, lambda m, x, y: torch.movedim(destination=2, source=0, input=x), ((2, 1),)),
        (TOKENS, lambda m, x, y: x.mean(1), ((2, 1),)),
        (TOKENS, lambda m, x, y: x.mean(1, keepdim=True), ((2, 2),)),
        (TOKENS, lambda m, x, y: x.mean([0, 1], keepdim=True), ((2, 2),)),
        (TOKENS, lambda m, x, y: x[:, 0], ((2, 1),)),
        (TOKENS, lambda m, x, y: x[-1], ((2, 1),)),
        (TOKENS, lambda m, x, y: x.select(1, -1), ((2, 1),)),
        (IMAGES, lambda m, x, y: x[:, :, 0, 0], ((1, 1),)),
        (IMAGES, lambda m, x, y: x[..., 0, :], ((1, 1), (3, 2))),
        (IMAGES, lambda m, x, y: x.select(3, 1), ((1, 1),)),
        (IMAGES, lambda m, x, y: x.flatten(2), ((1, 1),)),
        (IMAGES, lambda m, x, y: x.mean((2, 3)), ((1, 1),)),
        (IMAGES, lambda m, x, y: x.mean((-1, -2), True), ((1, 1),)),
        (IMAGES, lambda m, x, y: x.mean(3), ((1, 1),)),
        (IMAGES, lambda m, x, y: x.permute(0, 2, 3, 1), ((1, 3), (3, 2))),
        (IMAGES, lambda m, x, y: x.unsqueeze(-1), ((1, 1),)),
        (IMAGES, lambda m, x, y: x[..., None], ((1, 1),)),
        (TOKENS, lambda m, x, y: x[None, :, None], ((2, 4),)),
        (TOKENS, lambda m, x, y: x.unsqueeze(0).squeeze(0), ((3, 2),)),
        (IMAGES, lambda m, x, y: F.interpolate(x, scale_factor=2, mode="bilinear"), ((1, 1),)),
        (IMAGES, lambda m, x, y: F.adaptive_avg_pool2d(x, 1), ((1, 1),)),
        (IMAGES, lambda m, x, y: F.avg_pool2d(x, x.shape[2:]), ((1, 1),)),
        (IMAGES, lambda m, x, y: F.avg_pool2d(x, (x.size(2), 2), ceil_mode=True), ((1, 1),)),
        (IMAGES, lambda m, x, y: F.adaptive_avg_pool2d(x, (2, None)), ((1, 1),)),
        (IMAGES, lambda m, x, y: F.adaptive_avg_pool2d(x, 1).flatten(1), ((1, 1),)),
        (IMAGES, lambda m, x, y: F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2), ((1, 1),)),
    ],
)
def test_rows_elsewhere(shapes, function, moves):
    """Whatever acts on the channels before acts on them after: the numbers are checked by a random matrix."""
    found = meaning_at(function, shapes)
    assert isinstance(found, Rearranged) and set(found.moves) == set(moves)


@pytest.mark.parametrize(
    "function", [lambda m, x, y: x.view_as(y), lambda m, x, y: x.view(x.shape), lambda m, x, y: x.reshape(x.size())]
)
@pytest.mark.parametrize("shapes", [TOKENS, IMAGES])
def test_a_view_of_the_same_shape_is_none(shapes, function):
    assert isinstance(meaning_at(function, shapes), Same)


@pytest.mark.parametrize(
    ("shapes", "function"),
    [
        (TOKENS, lambda m, x, y: x[:, [0]]),
        (TOKENS, lambda m, x, y: x[:, 0, 1]),
        (TOKENS, lambda m, x, y: x[:, None, 0]),
        (TOKENS, lambda m, x, y: x.select(1, x.size(1) - 1)),
        (TOKENS, lambda m, x, y: x.flatten(1)),
        (TOKENS, lambda m, x, y: x.view(x.size(0), -1)),
        (TOKENS, lambda m, x, y: x.view(torch.int64)),
        (TOKENS, lambda m, x, y: x.sum(1)),
        (TOKENS, lambda m, x, y: x.amax(1)),
        (TOKENS, lambda m, x, y: x.mean(1, dtype=torch.float32)),
        (TOKENS, lambda m, x, y: x.mean()),
        (IMAGES, lambda m, x, y: F.avg_pool2d(x, (x.size(2), 2), padding=(1, 0))),
        (IMAGES, lambda m, x, y: F.avg_pool2d(x, x.shape[2:], divisor_override=3)),
        (IMAGES, lambda m, x, y: x.flatten(1)),
        (IMAGES, lambda m, x, y: F.adaptive_max_pool2d(x, 1)),
        ([(2, 4, 4)], lambda m, x, y: x.reshape(4, 2, 4).flatten(1)),
    ],
)
def test_no_rows(shapes, function):
    assert not isinstance(meaning_at(function, shapes), Rearranged)


X, T = image(2, C, 6, 7), image(2, 5, 8)


def tokens(forward) -> tuple[nn.Module, torch.Tensor]:
    return Spelled(forward, a=nn.Linear(8, 8), n=nn.BatchNorm1d(8), b=nn.BatchNorm1d(5)), T


def read_twice(m, x):
    y = m.a(x).flatten(0, 1)
    return m.n(y) * y.sin()


def pooled(pool) -> tuple[nn.Module, torch.Tensor]:
    return Spelled(lambda m, x: m.a(pool(m.n(x.abs()))), n=norm(), a=nn.Linear(C, 5)), X


@pytest.mark.parametrize(
    "made",
    [
        lambda: pooled(lambda x: F.adaptive_max_pool2d(x, 1).flatten(1)),
        lambda: pooled(lambda x: x.sum((2, 3))),
        lambda: pooled(lambda x: x.mean((2, 3)).relu()),
        lambda: tokens(lambda m, x: m.b(m.a(x))),  # it normalises places and not channels
        lambda: tokens(read_twice),
    ],
)
def test_a_norm_that_acts_on_something_else_stays(made):
    network, x = made()
    network = randomised(network)
    fused = fuse(network, (x,)).module
    assert operations(fused, x)["batch_norm"] == 1
    assert error(network, fused, x) < 1e-12


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (conv(3), nn.Linear(C, 5)),
        (conv(1, stride=2), nn.Linear(C, 5)),
        (conv(1, padding=1), nn.Linear(C, 5)),
        (conv(1, groups=2), nn.Linear(C, 5)),
        (nn.AvgPool2d(3, 1, 1), nn.Linear(C, 5)),
        (nn.Sequential(conv(1), nn.ReLU()), nn.Linear(C, 5)),
    ],
)
def test_a_layer_that_does_not_act_on_single_pixels_stays(first, last):
    network = randomised(Spelled(lambda m, x: m.last(m.first(x).mean((2, 3))), first=first, last=last))
    result = fuse(network, (X,))
    assert not result.plan.sites and error(network, result.module, X) == 0


def test_a_forward_may_ask_for_as_many_sizes_as_there_are():
    """It takes tokens with a batch axis and without one: the views there get other numbers of sizes."""

    def forward(m, x):
        y = m.a(x)
        return m.n(y.view(-1, y.shape[-1])).view(y.shape)

    network = randomised(Spelled(forward, a=nn.Linear(8, 8), n=nn.BatchNorm1d(8)))
    fused = fuse(network, (T,)).module
    assert operations(fused, T)["batch_norm"] == 0
    for x in (T, image(3, 9, 8), image(6, 8), image(2, 3, 4, 8)):
        assert error(network, fused, x) < 1e-12


def test_a_view_that_is_another_one_at_another_rank_is_left_alone():
    def forward(m, x):
        y = m.a(x)
        return m.n(y.reshape(-1, 8)) if x.dim() == 3 else m.n(y.reshape(8, -1).t())

    network = randomised(Spelled(forward, a=nn.Linear(8, 8), n=nn.BatchNorm1d(8)))
    fused = fuse(network, (T,)).module
    for x in (T, image(3, 9, 8), image(6, 8)):
        assert error(network, fused, x) < 1e-12


@pytest.mark.parametrize("times", [lambda x: x.dim(), lambda x: 5 - len(x.shape[1:])])
def test_a_number_that_is_another_one_at_another_rank_is_left_alone(times):
    network = randomised(Spelled(lambda m, x: m.a(x) * times(x), a=nn.Linear(8, 8)))
    fused = fuse(network, (T,)).module
    for x in (T, image(6, 8), image(2, 3, 4, 8)):
        assert error(network, fused, x) < 1e-12


@pytest.mark.parametrize("last", [conv(1), nn.Sequential(nn.BatchNorm2d(C), conv(1))], ids=["any rank", "batches"])
def test_a_shuffle_is_of_channels_where_every_input_has_a_batch(last):
    """Without one, what it shuffles are rows: of a network that takes such inputs it stays."""
    network = randomised(Spelled(lambda m, x: m.last(F.channel_shuffle(m.a(x), 2)), a=conv(1), last=last))
    found = fuse(network, (X,), policy="always")
    assert bool(found.plan.sites) == isinstance(last, nn.Sequential)
    assert error(network, found.module, X) < 1e-12
    if not found.plan.sites:
        assert error(network, found.module, X[0]) < 1e-12


def test_a_value_that_is_measured_alone_is_no_obstacle():
    def forward(m, x):
        y = m.a(x)
        return m.n(y.flatten(0, 1)).reshape_as(y).type_as(y)

    network = randomised(Spelled(forward, a=nn.Linear(8, 8), n=nn.BatchNorm1d(8)))
    fused = fuse(network, (T,)).module
    assert operations(fused, T)["batch_norm"] == 0
    for x in (T, image(3, 9, 8), image(1, 1, 8)):
        assert error(network, fused, x) < 1e-12


def test_a_part_that_nothing_reads_is_no_obstacle():
    def forward(m, x):
        first, _ = m.a(x).chunk(2, 1)
        _, second = m.b(x).chunk(2, 1)
        return (first + second).relu()

    network = randomised(Spelled(forward, a=conv(3), b=conv(1)))
    fused = fuse(network, (X,)).module
    assert (operations(fused, X)["convolution"], operations(fused, X)["add"]) == (1, 0)
    for x in (X, image(1, C, 5, 3)):
        assert error(network, fused, x) < 1e-12


def half_shuffled(m, x):
    y = m.a(x)
    return m.b(F.pixel_shuffle(y, 2)) + F.pixel_shuffle(y, 2).mean()


def viewed_between(m, x):
    n, _, h, w = (y := m.a(x)).shape
    return m.b(F.pixel_shuffle(y.view(n, 4 * C, h, w), 2))


STAY = {
    "a 3x3": (lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), {"c": conv(3)}),
    "a grouped 1x1": (lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), {"c": conv(1, groups=2)}),
    "a 1x1 that pads": (lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), {"c": conv(1, padding=1)}),
    "a step": (lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), {"c": conv(1, stride=2)}),
    "what is read twice": (half_shuffled, {}),
    "channels by number": (viewed_between, {}),
    "all channels, by number": (lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)[:, :C]), {}),
    "one that pays not": (lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), {"c": conv(1, outputs=64)}),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays_behind_depth_to_space(name):
    forward, members = STAY[name]
    layers = {"a": conv(3, outputs=4 * C), "b": conv(1, outputs=3)} | members
    model = randomised(Spelled(forward, **layers))
    fused = fuse(model, (image(1, C, 16, 16),)).module
    assert operations(fused, image(1, C, 16, 16))["convolution"] == 2
    for x in (image(1, C, 16, 16), image(2, C, 5, 8), image(1, C, 1, 1)):
        assert error(model, fused, x) < 1e-12


# --- at sizes of the input that are far from the example's --------------------------------------------------------


def windows(order, last):
    """Windows of 7 pixels along each axis: one of them at the example, more of them at larger sizes."""

    def forward(m, x):
        b, c, h, w = (y := m.a(x)).shape
        return m.n(y.view(b, c, h // 7, 7, w // 7, 7).permute(order).reshape(last(b, c, h, w)))

    return forward


def summed_windows(m, x):
    b, c, h, w = (y := m.a(x).relu()).shape
    return m.n(m.c(y.view(b, c, h // 7, 7, w // 7, 7).sum((3, 5))))


def batch_parted(m, x):
    y = m.a(x)
    return m.n(y.view(len(y) // 4, 4, *y.shape[1:]).transpose(0, 1).reshape(y.shape))


def axes_swapped(m, x):
    n, c, h, w = x.shape
    return m.a(x.view(n, c, w // 2, 2, h // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, c * 4, h // 2, w // 2))


def shuffled_and_pooled(m, x):
    return m.a(F.pixel_shuffle(m.b(x), 2).mean((2, 3)))


FAR = {
    "windows, put back": (
        windows((0, 1, 3, 2, 5, 4), lambda b, c, h, w: (b, c, h, w)),
        {"a": nn.Conv2d(C, C, 4, stride=4), "n": norm()},
        (1, C, 28, 28),
        (1, C, 56, 84),
    ),
    "windows, as samples": (
        windows((0, 2, 4, 1, 3, 5), lambda b, c, h, w: (-1, c, 7, 7)),
        {"a": nn.Conv2d(C, C, 4, stride=4), "n": norm()},
        (1, C, 28, 28),
        (1, C, 56, 56),
    ),
    "windows, summed": (
        summed_windows,
        {"a": nn.Conv2d(C, C, 4, stride=4), "c": nn.Conv2d(C, C, 1), "n": norm()},
        (1, C, 28, 28),
        (1, C, 56, 56),
    ),
    "the batch, parted": (batch_parted, {"a": conv(), "n": norm()}, (4, C, 6, 6), (8, C, 6, 6)),
    "axes, swapped": (axes_swapped, {"a": conv(inputs=4 * C)}, (2, C, 8, 8), (2, C, 8, 4)),
    "a batch of one, squeezed": (
        lambda m, x: m.a(x).mean((2, 3), keepdim=True).squeeze() * m.s,
        {"a": conv(), "s": scale(1, C)},
        (4, C, 6, 6),
        (1, C, 6, 6),
    ),
    "an axis that may be one, squeezed": (
        lambda m, x: m.a(x).squeeze(2) * m.s,
        {"a": conv(axes=1), "s": scale(C, 1)},
        (4, C, 8),
        (4, C, 1),
    ),
    "moved after depth to space": (
        shuffled_and_pooled,
        {"b": nn.Conv2d(C, 4 * C, 1), "a": nn.Linear(C, 3)},
        (2, C, 8, 8),
        (1, C, 5, 7),
    ),
}


@pytest.mark.parametrize("name", FAR)
def test_what_moves_values_moves_them_at_all_sizes(name):
    forward, members, example, far = FAR[name]
    model = randomised(Spelled(forward, **members))
    fused = fuse(model, (image(*example),)).module
    assert error(model, fused, image(*example)) < 1e-12
    assert error(model, fused, image(*far, seed=1)) < 1e-12


ORDERS = {
    "flipped": lambda y: y.flip(3),
    "turned over": lambda y: torch.flip(y, (2, 3)),
    "rolled": lambda y: y.roll(2, -1),
    "rolled by a half": lambda y: torch.roll(y, (y.shape[2] // 2, y.shape[3] // 2), (2, 3)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_norm_moves_across_pixels_in_another_order(name):
    model = randomised(Spelled(lambda m, x: m.n(ORDERS[name](m.a(x))), a=conv(), n=norm()))
    fused = fuse(model, (image(2, C, 6, 7),)).module
    assert operations(fused, image(2, C, 6, 7))["batch_norm"] == 0
    for x in (image(2, C, 6, 7), image(1, C, 9, 4), image(1, C, 1, 1)):
        assert error(model, fused, x) < 1e-12


@pytest.mark.parametrize(
    ("back", "undone"),
    [
        (lambda z, y: z.reshape_as(y), True),
        (lambda z, y: z.view(y.shape), True),
        (lambda z, y: z.view(y.shape[1], y.shape[0], -1), False),  # of one shape where there are as many of each
        (lambda z, y: z.view(y.shape[0], y.shape[1], 1, -1), False),
        (lambda z, y: z.view(y.shape).transpose(0, 1).contiguous().view(y.shape), False),
    ],
)
def test_views_go_with_the_norm_between_them_where_one_undoes_the_other(back, undone):
    def forward(m, x):
        y = m.a(x)
        return back(m.n(y.flatten(0, 1)), y)

    network = nn.Sequential(randomised(Spelled(forward, a=nn.Linear(6, 4), n=nn.BatchNorm1d(4))))
    result = fuse(network, [image(3, 3, 6)])
    assert isinstance(result.module[0], nn.Linear) == undone
    for shape in ((3, 3, 6), (2, 5, 6), (4, 1, 6)):
        assert error(network, result.module, image(*shape)) < 1e-12


# Each is given the sum of branches, its sizes as they were read from that, and a norm; a layer reads the result.
MEASURED = {
    "rows and back": lambda m, y, n, c, h, w: torch.relu(m.rows(y.view(n, c, h * w))).view(n, c, h, w),
    "tokens and back": lambda m, y, n, c, h, w: torch.relu(m.rows(y.flatten(2))).reshape(n, c, h, w),
    "pixels and back": lambda m, y, n, c, h, w: (
        torch.relu(m.rows(y.permute(0, 2, 3, 1).reshape(n * h * w, c))).view(n, h, w, c).permute(0, 3, 1, 2)
    ),
    "as it was": lambda m, y, n, c, h, w: torch.relu(m.rows(y.flatten(2))).view_as(y),
    "its shape": lambda m, y, n, c, h, w: torch.relu(m.norm(y)).view(y.shape),
    "its dtype": lambda m, y, n, c, h, w: torch.relu(m.norm(y)).type_as(y),
    "a frame": lambda m, y, n, c, h, w: torch.relu(m.norm(y)) + torch.zeros_like(y).cos() + y.new_ones(c, 1, 1).cos(),
    "a frame of sizes": lambda m, y, n, c, h, w: (
        torch.relu(m.norm(y)) + torch.ones(n, c, h, w, dtype=y.dtype, device=y.device).cos()
    ),
    "frames alike": lambda m, y, n, c, h, w: (
        torch.relu(m.norm(y)) + torch.ones_like(y).cos() + torch.full_like(y, 2).cos() + torch.empty_like(y).fill_(1)
    ),
    "chance": lambda m, y, n, c, h, w: (
        torch.relu(m.norm(y)) + (torch.rand_like(y) < 2) + (torch.randn_like(y).abs() < 0).to(y.dtype)
    ),
    "a constant spread": lambda m, y, n, c, h, w: torch.relu(m.norm(y)) + m.rows.bias[:, None, None].expand_as(y),
    "resized": lambda m, y, n, c, h, w: F.interpolate(torch.relu(m.norm(y)), size=(2 * h, w)),
    "divided": lambda m, y, n, c, h, w: torch.relu(m.norm(y)) / h + w,
    "means": lambda m, y, n, c, h, w: torch.relu(m.norm(y).mean((2, 3), keepdim=True)) * h / w,
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", MEASURED)
def test_sizes_of_what_merges_are_those_of_something_that_stays(name, stride):
    def forward(m, x):
        y = m.a(x) + m.b(x)
        return m.last(MEASURED[name](m, y, *y.shape))

    layers = {"a": conv(3, stride=stride), "b": conv(1, stride=stride), "last": conv(3)}
    model = randomised(Spelled(forward, **layers, rows=nn.BatchNorm1d(C), norm=norm()))
    x = image(2, C, 8, 6)
    fused = fuse(model, (x,), keep_class=False).module
    found = operations(fused, x)
    assert (found["convolution"], found["batch_norm"]) == (2, 0)
    for shape in ((2, C, 8, 6), (1, C, 5, 9), (3, C, 2, 1)):
        assert error(model, fused, image(*shape)) < 1e-12


@pytest.mark.parametrize("name", sorted(MEASURED.keys() - {"means"}))
def test_sizes_are_read_as_before_where_the_norm_alone_goes(name):
    def forward(m, x):
        y = m.a(x)
        return MEASURED[name](m, y, *y.shape)

    model = randomised(Spelled(forward, a=conv(3, stride=2), rows=nn.BatchNorm1d(C), norm=norm()))
    fused = fuse(model, (X,)).module
    assert type(fused) is Spelled and operations(fused, X)["batch_norm"] == 0
    for shape in ((2, C, 6, 7), (1, C, 5, 9), (3, C, 2, 1)):
        assert error(model, fused, image(*shape)) < 1e-12


@pytest.mark.parametrize("like", [lambda m, x, y: y, lambda m, x, y: x])
def test_what_spreads_a_constant_goes_with_the_layer_that_takes_it_in(like):
    """Whether it is made as large as what merges, or as something that stays."""

    def forward(m, x):
        y = m.a(x) + m.b(x)
        return y * m.norm.weight[:, None, None].expand_as(like(m, x, y))

    model = randomised(Spelled(forward, a=conv(3), b=conv(1), norm=norm()))
    fused = fuse(model, (X,), keep_class=False).module
    found = operations(fused, X)
    assert (found["convolution"], found["mul"], found["expand"]) == (1, 0, 0)
    for shape in ((2, C, 6, 7), (1, C, 5, 9), (3, C, 2, 1)):
        assert error(model, fused, image(*shape)) < 1e-12


def test_a_size_that_nothing_else_has_leaves_what_is_measured():
    def forward(m, x):
        y = F.pad(x, (1, 2, 3, 1))
        z = m.a(y[..., :-1]) + m.b(y[..., 1:])
        return torch.relu(m.norm(z)) * y.shape[2] * z.numel()

    model = randomised(Spelled(forward, a=conv(3), b=conv(3), norm=norm()))
    result = fuse(model, (X,), keep_class=False)
    assert operations(result.module, X)["batch_norm"] == 1
    assert {"value-escapes"} == {refusal.code for refusal in result.plan.refusals}
    for shape in ((2, C, 6, 7), (1, C, 5, 9)):
        assert error(model, result.module, image(*shape)) < 1e-12


@pytest.mark.parametrize("name", ["rows and back", "a frame of sizes", "resized"])
def test_an_exported_program_measures_what_merges_too(name):
    def forward(m, x):
        y = m.a(x) + m.b(x)
        return MEASURED[name](m, y, *y.shape)

    model = randomised(Spelled(forward, a=conv(3), b=conv(1), rows=nn.BatchNorm1d(C), norm=norm()))
    x = image(2, C, 8, 6)
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (x,), dynamic_shapes=(free,)).module()
    fused = fuse(program, (x,)).module
    found = operations(fused, x)
    assert (found["convolution"], found["batch_norm"]) == (1, 0)
    for shape in ((2, C, 8, 6), (3, C, 5, 9)):
        assert error(model, fused, image(*shape)) < 1e-12
