"""Every refusal code: what it means and what to do. ``repfuse explain``, the plan and the docs read this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """What a refusal code means (``meaning``) and what the user can do (``hint``)."""

    title: str
    meaning: str
    hint: str


REFUSALS: dict[str, Explanation] = {
    "broadcast": Explanation(
        "a sum of tensors of different shapes",
        "One addend is repeated along an axis to fit the other. Such a sum is not one convolution of one source: a "
        "map of one channel that is added to all of them, or one pixel to all, is outside of what repfuse merges.",
        "Write the sum with operands of one shape, or leave it: the result is right as it is.",
    ),
    "called-differently": Explanation(
        "a module that is called several times, not always alike",
        "The module that holds this place runs more than once per forward, and what can be merged differs between its "
        "calls. One rewritten module could not serve all of them.",
        "Use separate modules, or call the shared one in the same way each time.",
    ),
    "channel-mismatch": Explanation(
        "branches with different numbers of channels",
        "The branches read the same source but differ in their channels or axes, so their kernels have no common "
        "shape.",
        "Check that the example input has a batch axis: N x C x H x W, not C x H x W.",
    ),
    "composition": Explanation(
        "an affine layer on top of another",
        "A convolution whose input is a convolution, a sum or a normalisation, with nothing in between. Such a pair "
        "can be one convolution in some cases. This version merges branches and normalisations and leaves layers in a "
        "row as they are.",
        "Nothing to do: the result is right, and the layers before and after are merged each for itself.",
    ),
    "computed-weight": Explanation(
        "a weight that is computed in forward",
        "The weight, bias or statistics are the result of other operations (a parametrisation, weight "
        "standardisation, OREPA-style products), not parameters or buffers that the file holds.",
        "Remove the parametrisation first (torch.nn.utils.parametrize.remove_parametrizations), then convert.",
    ),
    "cost": Explanation(
        "exact, but predicted to be slower",
        "The branches can be merged, but the one kernel would need more multiply-accumulates and memory traffic than "
        "the branches do, for example where a grouped and a dense branch become one dense kernel.",
        "Nothing to do. The report shows both estimates.",
    ),
    "custom-convolution": Explanation(
        "a convolution class with its own arithmetic",
        "The class derives from a convolution of PyTorch and overrides what it computes, so its weight does not say "
        "it all.",
        "Replace it by the plain class where the override does nothing in inference.",
    ),
    "hooks": Explanation(
        "a module with forward hooks",
        "A hook may change or record what goes through the module. The module would be gone after the rewrite, and "
        "the hook with it. The old torch.nn.utils.weight_norm and spectral_norm are such hooks.",
        "Remove the hooks (torch.nn.utils.remove_weight_norm, handle.remove()), then convert.",
    ),
    "in-place": Explanation(
        "a value that is overwritten in between",
        "An operation in place changes a tensor that this place, or something after it, reads. Computing the sum at "
        "once would read the tensor before or after the change, and not as the model does.",
        "Write the operation out of place: x = x + y instead of x += y, ReLU(inplace=False).",
    ),
    "no-convolution": Explanation(
        "a sum of skips and normalisations alone",
        "There is no convolution to merge these into. As one depthwise 1x1 convolution they would hardly be faster.",
        "Nothing to do: the result is right as it is.",
    ),
    "outer-reference": Explanation(
        "a block that uses values it is not given",
        "The forward of the block reads a parameter or a tensor of another module other than through its arguments, "
        "so it cannot be rewritten on its own.",
        "Pass the value as an argument, or register the parameter in the block.",
    ),
    "padding-mode": Explanation(
        "a padding that is not zeros, in a sum",
        "With reflect, replicate or circular padding the value outside of the image depends on the image. A 1x1 "
        "branch or a skip reads no padding, so at the border the branches see different sources.",
        "A normalisation alone is still folded in. For the sum, train with zero padding.",
    ),
    "reserved-name": Explanation(
        "a block with a child of a name that torch.fx needs",
        "The block would have to become a torch.fx.GraphModule, which has members of its own called graph and code.",
        "Give the child another name.",
    ),
    "several-sources": Explanation(
        "a normalisation of a sum over several sources",
        "The sum joins branches of different tensors. Each source keeps a convolution of its own, and the "
        "normalisation after the sum stays.",
        "Nothing to do: the branches of each source are merged for themselves.",
    ),
    "shift-before-padding": Explanation(
        "a normalisation before a convolution that pads",
        "The zeros of the padding are added after the normalisation. Folded into the convolution, the normalisation's "
        "shift would reach into the padding, and the border would be wrong by the size of the shift (measured: up to "
        "13 %).",
        "Nothing to do here. When you design the block: put the normalisation after the convolution, or pad before it.",
    ),
    "size-mismatch": Explanation(
        "branches whose output sizes agree only for some inputs",
        "At this input size the branches give maps of one size, but for another size they would not, and the model "
        "would fail there. One convolution cannot fail in the same places, so the branches are not the same map.",
        "Choose padding so that every branch keeps the same size: padding = dilation * (kernel - 1) / 2.",
    ),
    "stride-mismatch": Explanation(
        "branches with different strides",
        "The branches read the source at different steps, so no one kernel covers both.",
        "Nothing to do: the result is right as it is.",
    ),
    "structured-arguments": Explanation(
        "a block that takes or returns tensors in structures of its own",
        "The block would have to become a graph of its own, which takes named arguments only and returns tensors in "
        "tuples, lists and dicts.",
        "Give the block's forward one argument per tensor, and let it return plain tensors.",
    ),
    "training-norm": Explanation(
        "a normalisation that uses the statistics of the batch",
        "A normalisation is an affine map only with frozen statistics. In training mode, or with "
        "track_running_stats=False, its scale depends on the input, so it cannot be folded into a weight.",
        "Call model.eval(), or train with track_running_stats=True.",
    ),
    "untraceable": Explanation(
        "a module that symbolic tracing cannot read",
        "Its forward decides by values or shapes, or loops over a tensor. It stays as it is.",
        "Move the deciding part into a small module of its own, so that the rest can be read.",
    ),
    "value-escapes": Explanation(
        "a value that something else reads too",
        "The branch could be merged, but its result is also used elsewhere, so it has to be computed in any case.",
        "Nothing to do: the result is right as it is.",
    ),
}
