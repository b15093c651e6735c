"""Weights that forward code computes from parameters: found, and evaluated to what the model convolves with."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from blocks import Spelled
from support.agreement import error, operations, randomised
from support.agreement import image as noise
from support.recordings import buffered, kernels, named, parameter, recorded, run
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from repfuse.fusing import fuse

X = (2, 4, 7, 6)


def constants_and_weight(model):
    dtype = next((x.dtype for x in model.parameters()), torch.float64)
    found = recorded(model, noise(*X, dtype=dtype))
    return found.constants, named(found, "conv2d")[-1].args[1]


def stored(model):
    """The tensors of a model by name, also those that are plain attributes."""

    def tensor(name):
        path, _, leaf = name.rpartition(".")
        return getattr(model.get_submodule(path), leaf)

    return tensor


def conv(weight):
    """A forward that convolves its input with ``weight(self)``."""
    return lambda m, x: F.conv2d(x, weight(m), padding=1)


def standardised(m):
    flat = m.w.reshape(m.w.shape[0], -1)
    mean, deviation = flat.mean(1, keepdim=True), flat.std(1, keepdim=True)
    return ((flat - mean) / (deviation + 1e-5)).reshape(m.w.size())


def normalised(m):
    """Weights standardised by a normalisation in training mode that keeps no statistics."""
    rows = F.batch_norm(m.w.view(1, 4, -1), None, None, weight=m.g.view(-1), training=True, momentum=0.0)
    return rows.reshape_as(m.w)


def normalised_otherwise(m):
    return torch.batch_norm(m.w.view(1, 4, -1), m.g, None, None, None, True, 0.0, 1e-5, False).view(m.w.shape)


def spread(m):
    """Numbers laid on the diagonal of an empty kernel, one write each."""
    kernel = torch.zeros(4, 4, 3, 3, dtype=m.w.dtype, device=m.w.device)
    for i in range(len(m.g)):
        kernel[i, i, :, :] = m.g[i] * m.w[i, 0]
    return kernel


def in_place(m):
    kernel = m.w.clone()
    kernel.mul_(m.g.view(-1, 1, 1, 1)).view(-1)[0:3] = 7.0
    kernel += 1
    return kernel


def viewed_before_the_write(m):
    kernel = m.w.clone()
    first = kernel[0:2]
    kernel[0, 0] = 5.0
    return torch.cat([first * 1, m.w[2:]])


def written_after(m, x):
    kernel = m.w * 2
    y = F.conv2d(x, kernel)
    kernel[0] = x.mean()
    return y


def asked_after_the_write(m):
    kernel = m.w.clone()
    view = kernel[0]
    kernel[0] = 5.0
    return m.w * float(view.sum())


def repeated(m):
    total = m.w
    for _ in range(m.times):
        total = total + m.w * float(m.alpha) * int(m.alpha * 10)
    return total if m.flag else -total


def swapped(first, second):
    return torch.cat([second, first])


def identity_kernel(m):
    return m.w + m.eye.to(m.w.device).type_as(m.w)


def of_half(m):
    return (m.w.half() + m.g.view(-1, 1, 1, 1).half()).double()


def hooked(module):
    module.register_forward_hook(lambda _module, _given, y: y * 2)
    return module


W = functools.partial(parameter, 4, 4, 3, 3)
G = functools.partial(parameter, 4, seed=1)
EYE = F.pad(torch.eye(4).reshape(4, 4, 1, 1), (1, 1, 1, 1))

COMPUTED = {
    "einsum": Spelled(conv(lambda m: torch.einsum("oihw,o->oihw", m.w, m.g)), w=W(), g=G()),
    "mask": buffered(Spelled(conv(lambda m: m.w * m.mask), w=W()), mask=(noise(4, 4, 3, 3) > 0).double()),
    "standardised": Spelled(conv(standardised), w=W()),
    "product of kernels": Spelled(
        conv(lambda m: F.conv2d(m.w, m.v.permute(1, 0, 2, 3))), w=W(), v=parameter(4, 4, 1, 1, seed=2)
    ),
    "standardised by a normalisation": Spelled(conv(normalised), w=W(), g=G()),
    "standardised by a normalisation, torch": Spelled(conv(normalised_otherwise), w=W(), g=G()),
    "padded": Spelled(conv(lambda m: F.pad(m.v, [1, 1, 1, 1]) + m.w), w=W(), v=parameter(4, 4, 1, 1, seed=2)),
    "cat and split": Spelled(conv(lambda m: torch.cat(torch.chunk(m.w, 2)[::-1])), w=W()),
    "unpacked": Spelled(conv(lambda m: torch.stack([2 * row for row in m.w])), w=W()),
    "unpacked by names": Spelled(conv(lambda m: swapped(*m.w.split(2))), w=W()),
    "sum over an axis": Spelled(conv(lambda m: sum(m.v)), v=parameter(3, 4, 4, 3, 3)),
    "size of a slice": Spelled(conv(lambda m: m.w * m.w[:2].numel() + m.w.ndim + m.w.dim()), w=W()),
    "transposed by property": Spelled(conv(lambda m: m.v.T.data.view(4, 4, 3, 3)), v=parameter(36, 4)),
    "spread": Spelled(conv(spread), w=W(), g=G()),
    "written after it is read": Spelled(written_after, w=W()),
    "asked of a view after a write": Spelled(conv(asked_after_the_write), w=W()),
    "a number of its own": Spelled(conv(lambda m: m.w * math.sqrt(m.g.square().sum())), w=W(), g=G()),
    "in place on a copy": Spelled(conv(in_place), w=W(), g=G()),
    "a view of what is written": Spelled(conv(viewed_before_the_write), w=W()),
    "made of numbers": Spelled(conv(lambda m: m.w * torch.linspace(0.5, 2, 3, dtype=m.w.dtype)), w=W()),
    "plain tensor": Spelled(conv(identity_kernel), w=W(), eye=EYE),
    "plain tensor alone": Spelled(conv(lambda m: m.eye * 2), eye=EYE.double()),
    "plain tensor rewritten in Python": Spelled(conv(lambda m: setattr(m, "eye", m.w * 3) or m.eye), w=W(), eye=EYE),
    "module": Spelled(conv(lambda m: m.act(m.w)), w=W(), act=nn.Softplus()),
    "module with parameters": Spelled(conv(lambda m: m.act(m.w)), w=W(), act=nn.PReLU().double()),
    "module with a hook": Spelled(conv(lambda m: m.act(m.w)), w=W(), act=hooked(nn.Softplus())),
    "numbers": buffered(Spelled(conv(repeated), w=W()), times=torch.tensor(3), alpha=noise(), flag=torch.tensor(False)),
    "item": Spelled(conv(lambda m: m.w * (1 + m.g.sum().item())), w=W(), g=G()),
    "branch on a comparison": Spelled(conv(lambda m: m.w if m.g[0] > 100 else 3 * m.w), w=W(), g=G()),
    "dtype said": Spelled(conv(of_half), w=W(), g=G()),
    "dtype of another": Spelled(conv(lambda m: m.w.to(m.g.dtype).to(m.g.device)), w=W(), g=G()),
    "read twice": Spelled(lambda m, x: F.conv2d(F.conv2d(x, m.w), m.w), w=W()),
}


def conv_module(normalise=lambda module: module, **options):
    return normalise(nn.Conv2d(4, 4, 3, padding=1, **options).double())


class Symmetric(nn.Module):
    def forward(self, w):
        return w + w.flip(-1) + torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)


def parametrised(module, *parametrisations):
    for each in parametrisations:
        parametrize.register_parametrization(module, "weight", each, unsafe=True)
    return module


def spectral(module):
    """The old hook sets its vectors up in a first step of training."""
    module = torch.nn.utils.spectral_norm(module)
    module(noise(*X))
    return module


PARAMETRISED = {
    "old weight_norm": conv_module(torch.nn.utils.weight_norm),
    "old weight_norm over all": conv_module(lambda m: torch.nn.utils.weight_norm(m, dim=None)),
    "old weight_norm of the bias too": conv_module(
        lambda m: torch.nn.utils.weight_norm(torch.nn.utils.weight_norm(m), "bias")
    ),
    "old spectral_norm": conv_module(spectral),
    "old spectral_norm, other axis": conv_module(lambda m: torch.nn.utils.spectral_norm(m, dim=1)),
    "weight_norm": conv_module(parametrizations.weight_norm),
    "spectral_norm": conv_module(parametrizations.spectral_norm),
    "custom": conv_module(lambda m: parametrised(m, Symmetric())),
    "two": conv_module(lambda m: parametrised(parametrizations.weight_norm(m), Symmetric())),
    "a module": conv_module(lambda m: parametrised(m, nn.Softplus())),
    "inside": nn.Sequential(nn.ReLU(), conv_module(parametrizations.weight_norm, bias=False)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*COMPUTED, *PARAMETRISED])
def test_a_computed_weight_is_what_the_model_convolves_with(name):
    model, x = (COMPUTED | PARAMETRISED)[name].eval(), noise(*X, seed=9)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = recorded(model, x)
    constants = found.constants
    with torch.no_grad():
        assert (run(found, x) - model(x)).abs().max() < 1e-12
    convolutions = named(found, "conv2d")
    for node, kernel in zip(convolutions, kernels(model, x)[-len(convolutions) :], strict=True):
        weight = constants.name_of(node.args[1])
        value = constants.evaluate(weight, stored(model))
        assert constants.shape(weight) == tuple(kernel.shape) == tuple(value.shape)
        assert value.dtype is torch.float64 and (value - kernel).abs().max() <= 1e-12 * kernel.abs().max()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), "recording or evaluating changed the model"


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_an_orthogonal_weight_is_constant(orthogonal_map):
    model = parametrizations.orthogonal(nn.Linear(5, 3).double(), orthogonal_map=orthogonal_map).eval()
    found = recorded(model, noise(2, 5))
    name = found.constants.name_of(named(found, "linear")[0].args[1])
    assert (found.constants.evaluate(name, stored(model)) - model.weight).abs().max() < 1e-12


def test_leaves_are_the_tensors_that_a_value_is_computed_from():
    constants, weight = constants_and_weight(Spelled(conv(spread), w=W(), g=G()))
    assert set(constants.leaves(constants.name_of(weight))) == {"w", "g"}
    constants, weight = constants_and_weight(Spelled(conv(lambda m: m.w), w=W()))
    assert (constants.name_of(weight), constants.leaves("w"), constants.shape("w")) == ("w", ("w",), (4, 4, 3, 3))


def test_weights_of_lower_precision_are_computed_in_float64():
    """The value is rounded once, at the end, by whoever stores it; the model rounds after every step."""
    model = Spelled(conv(lambda m: (m.w * m.g.view(-1, 1, 1, 1) + 1) * 3), w=W(), g=G()).to(torch.bfloat16)
    constants, weight = constants_and_weight(model)
    value = constants.evaluate(constants.name_of(weight), stored(model))
    exact = (model.w.double() * model.g.double().view(-1, 1, 1, 1) + 1) * 3
    assert value.dtype is torch.float64 and torch.equal(value, exact)


def test_a_dtype_that_the_graph_names_is_kept():
    model = Spelled(lambda m, x: F.conv2d(x.float(), m.w.float() + m.g.float().view(-1, 1, 1, 1)), w=W(), g=G())
    constants, weight = constants_and_weight(model)
    value = constants.evaluate(constants.name_of(weight), stored(model))
    assert value.dtype is torch.float32 and torch.equal(value, model.w.float() + model.g.float().view(-1, 1, 1, 1))


def test_a_number_is_a_constant_without_axes():
    model = Spelled(lambda m, x: x * torch.sqrt(m.g.sum()) * m.g.sum(), g=nn.Parameter(torch.ones(4)))
    found = recorded(model, noise(*X))
    name = found.constants.name_of(named(found, "sqrt")[0])
    assert found.constants.shape(name) == () and found.constants.evaluate(name, lambda _: torch.ones(4)) == 2


def test_a_number_that_forward_asks_of_a_constant_stands_in_the_graph():
    found = recorded(Spelled(lambda m, x: x * math.sqrt(m.g.sum()), g=nn.Parameter(torch.ones(4))), noise(*X))
    assert named(found, "mul")[0].args[1] == 2 and found.depends_on_weights and not found.marks


def test_only_tensors_have_names():
    found = recorded(Spelled(conv(lambda m: torch.chunk(m.w, 2)[0].to(m.w.dtype)), w=W()), noise(*X))
    names = {found.names[node]: found.constants.name_of(node) for node in found.nodes}
    assert names["/chunk"] is None and names["/getattr"] is None and names["/input"] is None
    assert names["/w"] == "w" and names["/to"] == "%to" and found.constants.name_of(3) is None


# --- what is not constant -------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Writes into its own buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k", noise(4, 4, 3, 3))

    def forward(self, x):
        self.k += 1
        return x


class Noisy(nn.Module):
    def forward(self, w):
        return w + torch.randn_like(w)


def written(write, weight=lambda m: m.k):
    """A buffer that ``write`` overwrites after it was read: the next call convolves with something else."""

    def forward(m, x):
        y = F.conv2d(x, weight(m) * 1, padding=1)
        write(m)
        return y

    return buffered(Spelled(forward), k=noise(4, 4, 3, 3))


def half_written(m, x):
    kernel = torch.zeros_like(m.w)
    kernel[0] = x.mean()
    kernel[1] = m.w[1]
    return F.conv2d(x, kernel)


def read_after_the_write(m, x):
    kernel = m.w.clone()
    kernel.mul_(x.mean())
    return F.conv2d(x, kernel)


def seen_by_a_view(m, x):
    kernel = m.w.clone()
    view = kernel[:]
    kernel[0] = 3.0
    return F.conv2d(x, view)


def trained_norm(m, x):
    y = F.conv2d(x, m.w * m.norm.running_var.view(-1, 1, 1, 1), padding=1)
    return m.norm(y)


def functional_norm(m, x):
    y = F.conv2d(x, m.w * m.k[0, 0, 0, 0], padding=1)
    return F.batch_norm(y, m.k.view(36, 4)[0], m.k.view(36, 4)[1], training=True)


VARYING = {
    "add_": written(lambda m: m.k.add_(1)),
    "iadd": written(lambda m: m.k.__iadd__(1)),
    "slice": written(lambda m: m.k.__setitem__((0, 0), 1.0)),
    "view": written(lambda m: m.k.view(-1)[:3].mul_(2)),
    "slice of a view": written(lambda m: m.k[0].__setitem__(1, 0.0)),
    "data": written(lambda m: m.k.data.mul_(2)),
    "data, by slice": written(lambda m: m.k.data.__setitem__(0, 0.0)),
    "detached": written(lambda m: m.k.detach().zero_()),
    "out=": written(lambda m: torch.mul(m.k, 2, out=m.k)),
    "aten": written(lambda m: torch.ops.aten.mul_.Scalar(torch.ops.aten.slice.Tensor(m.k, 0, 0, 1), 2)),
    "einsum": written(lambda m: torch.einsum("abcd->badc", m.k).mul_(2)),
    "statistics": written(
        lambda m: torch.batch_norm(m.k, None, None, m.k[0, :, 0, 0], m.k[1, :, 0, 0], True, 0.1, 0.0, False)
    ),
    "foreach": written(lambda m: torch._foreach_mul_([m.k], 2)),
    "itself": written(lambda m: None, weight=lambda m: m.k.mul_(2)),
    "written by a module": Spelled(lambda m, x: F.conv2d(m.u(x), m.u.k * 1), u=Counting().eval()).eval(),
    "norm in training": Spelled(trained_norm, w=W(), norm=nn.BatchNorm2d(4).double()),
    "F.batch_norm in training": buffered(Spelled(functional_norm, w=W()), k=noise(4, 4, 3, 3).abs()),
    "by the input": Spelled(lambda m, x: F.conv2d(x, m.w * x.mean()), w=W()),
    "partly by the input": Spelled(half_written, w=W()),
    "by the input, in place": Spelled(read_after_the_write, w=W()),
    "changed under a view": Spelled(seen_by_a_view, w=W()),
    "random factor": Spelled(conv(lambda m: m.w * torch.rand_like(m.w)), w=W()),
    "random tensor": Spelled(conv(lambda m: m.w * torch.rand(4, 1, 1, 1)), w=W()),
    "random, in place": Spelled(conv(lambda m: m.w * torch.ones(4, 1, 1, 1).normal_()), w=W()),
    "dropout": Spelled(conv(lambda m: F.dropout(m.w, 0.5)), w=W()),
    "dropout module": Spelled(conv(lambda m: m.drop(m.w)), w=W(), drop=nn.Dropout()),
    "memory as it is": Spelled(conv(lambda m: m.w * torch.empty(4, 1, 1, 1)), w=W()),
    "noise as parametrisation": conv_module(lambda m: parametrised(m, Noisy())),
    "spectral_norm in training": conv_module(parametrizations.spectral_norm),
    "old spectral_norm in training": conv_module(spectral),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARYING)
def test_what_varies_is_not_constant(name):
    model = VARYING[name]
    constants, weight = constants_and_weight(model)
    assert constants.name_of(weight) is None


@pytest.mark.parametrize("name", ["dropout module"])
def test_the_same_in_eval_is_constant(name):
    constants, weight = constants_and_weight(VARYING[name].eval())
    assert constants.name_of(weight) == "%dropout"
    VARYING[name].train()


def test_two_names_of_one_memory_are_one_tensor():
    kernel = noise(4, 4, 3, 3)
    for other in (kernel, kernel[:2], nn.Parameter(kernel.view(-1), requires_grad=False)):
        model = Spelled(lambda m, x: F.conv2d(x, m.k * 1) + m.other.mul_(2).sum())
        buffered(model, k=kernel)
        model.other = other
        constants, weight = constants_and_weight(model)
        assert constants.name_of(weight) is None


def test_a_write_elsewhere_is_no_obstacle():
    model = buffered(Spelled(lambda m, x: F.conv2d(x, m.w * 2) + m.count.add_(1), w=W()), count=torch.zeros(1))
    constants, weight = constants_and_weight(model.double())
    assert constants.name_of(weight) == "%mul"


def test_what_would_write_into_the_model_is_not_even_tried():
    """An embedding with ``max_norm`` rescales its weight, which no name tells."""
    rows = conv(lambda m: F.embedding(torch.arange(4), m.e, max_norm=1.0).view(4, 4, 3, 3))
    model = Spelled(rows, e=parameter(4, 36))
    before = model.e.detach().clone()
    constants, weight = constants_and_weight(model)
    assert constants.name_of(weight) is None and torch.equal(model.e, before)


# --- weights that the forward puts where others were ---------------------------------------------------------------


class Written(nn.Module):
    """Every forward computes the kernel of a convolution ``e``, and ``writes`` it there.

    As Bhardwaj et al., "Collapsible Linear Blocks for Super-Efficient Super Resolution" (SESR, arXiv 2103.09404), and
    what was made after it do.
    """

    def __init__(self, writes) -> None:
        super().__init__()
        self.writes = writes
        self.a, self.b, self.e = (nn.Conv2d(4, 4, kernel, padding=kernel // 2) for kernel in (3, 1, 3))
        self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, x):
        more = self.writes(self.e, self.a.weight * self.scale, x)
        return (self.e(x) + self.b(x) + (0 if more is None else more)).relu()


def set_as_data(e, kernel, x):
    e.weight.data = kernel.data


def copied_into_data(e, kernel, x):
    e.weight.data.copy_(kernel)
    e.bias.data.copy_(kernel.mean((1, 2, 3)))


def copied_one_number(e, kernel, x):
    e.weight.data.copy_(kernel.mean())


def copied_without_gradients(e, kernel, x):
    with torch.no_grad():
        e.weight.copy_(kernel)
        e.bias.copy_(kernel.mean((1, 2, 3)))


def assigned_whole(e, kernel, x):
    with torch.no_grad():
        e.weight[:] = kernel
    e.bias.data[...] = kernel.mean((1, 2, 3))


def assigned_one_number(e, kernel, x):
    e.weight.data[:, :, :] = kernel.mean()


def copied_and_read(e, kernel, x):
    e.weight.data.copy_(kernel)
    return e.weight.sum()


def read_elsewhere(e, kernel, x):
    e.weight.data.copy_(kernel)
    return x.abs() * e.weight.sum()


def copied_and_turned(e, kernel, x):
    e.weight.data.copy_(kernel)
    return F.conv2d(x, e.weight.transpose(0, 1), padding=1)


def rounded(e, kernel, x):
    e.low = torch.empty_like(kernel, dtype=torch.bfloat16) if not hasattr(e, "low") else e.low
    e.low.copy_(kernel)
    return F.conv2d(x, e.low.to(x.dtype), padding=1)


def a_number_copied(e, kernel, x):
    e.weight.data.copy_(0.5)


def changed_afterwards(e, kernel, x):
    e.weight.data.copy_(kernel)
    kernel.mul_(3)


def changed_where_it_lies(e, kernel, x):
    e.weight.data = kernel
    kernel.mul_(3)


def copied_twice(e, kernel, x):
    e.weight.data.copy_(kernel)
    e.weight.data.copy_(2 * kernel)


def copied_in_part(e, kernel, x):
    e.weight.data[:, :2].copy_(kernel[:, :2])


def assigned_in_part(e, kernel, x):
    with torch.no_grad():
        e.weight[:, :, 1:] = kernel[:, :, 1:]


def features_without_gradients(e, kernel, x):
    with torch.no_grad():
        e.weight.copy_(kernel)
        return e(x) * x.amax()


def gradients_left_off(e, kernel, x):
    e.weight.data.copy_(kernel)
    torch.set_grad_enabled(False)


def added(e, kernel, x):
    e.weight.data.copy_(e.weight + kernel)


def of_the_image(e, kernel, x):
    e.weight.data = kernel * x.amax()


def read_before(e, kernel, x):
    y = e(x)
    e.weight.data.copy_(kernel)
    return y


def written(how):
    torch.default_generator.manual_seed(0)
    return randomised(Written(how)).requires_grad_(False)


ALWAYS = [set_as_data, copied_into_data, copied_one_number, copied_and_read, copied_without_gradients, assigned_whole]
ALWAYS += [assigned_one_number]


@pytest.mark.parametrize("how", ALWAYS)
def test_a_kernel_that_every_forward_writes_becomes_a_plain_weight(how):
    original, x = written(how), noise(*X)
    result = fuse(copy.deepcopy(original), (x,))
    assert operations(result.module, x) == {"convolution": 1, "relu": 1, "clone": 1}
    for seed, shape in enumerate([X, (1, 4, 9, 5), (3, 4, 1, 2)]):
        assert error(original, result.module, noise(*shape, seed=seed)) < 1e-12


OTHERS = [copied_twice, copied_in_part, added, of_the_image, read_before, read_elsewhere, copied_and_turned]
OTHERS += [a_number_copied, changed_afterwards, changed_where_it_lies, rounded]
OTHERS += [assigned_in_part, features_without_gradients, gradients_left_off]


@pytest.mark.parametrize("how", OTHERS)
def test_a_kernel_that_is_another_one_elsewhere_or_later_is_left_as_it_is(how):
    original, x = written(how), noise(*X)
    result = fuse(copy.deepcopy(original), (x,))
    assert operations(copy.deepcopy(result.module), x)["copy"] == operations(copy.deepcopy(original), x)["copy"]
    for seed, shape in enumerate([X, (1, 4, 9, 5), X]):
        assert error(original, result.module, noise(*shape, seed=seed)) < 1e-12
