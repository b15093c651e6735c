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
    "autocast": Explanation(
        "an operation in a region of automatic mixed precision",
        "The forward enters torch.autocast around this place, so it computes in another precision than its weights "
        "have. Written down as a graph the region would be lost. What it calls is merged for itself.",
        "Enter autocast outside of the network, around its call.",
    ),
    "broadcast": Explanation(
        "a sum or product of tensors of different shapes",
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
    "changes-with-size": Explanation(
        "a place that does something else at other sizes",
        "The network was run at several sizes of its inputs. Here the forward did other operations, or gave them other "
        "numbers or other operands, when the size was another one. What it calls is merged for itself.",
        "Nothing to do: the result is right as it is, at every size.",
    ),
    "channel-mismatch": Explanation(
        "branches with different numbers of channels",
        "The branches read the same source but differ in their channels or axes, so their kernels have no common "
        "shape.",
        "Check that the example input has a batch axis: N x C x H x W, not C x H x W.",
    ),
    "computed-weight": Explanation(
        "a weight that depends on the input",
        "The weight, bias or statistics are computed in forward from what the model is given, at random, or from a "
        "buffer that the forward also writes. What is computed from parameters alone is folded; a weight that depends "
        "on data has no one value.",
        "Nothing to do where that is the idea (dynamic convolution). Else compute the weight from parameters alone.",
    ),
    "cost": Explanation(
        "exact, but predicted to gain nothing",
        "The layers or branches can be merged, but the one kernel would need more multiply-accumulates and memory "
        "traffic than they do: a grouped and a dense branch become one dense kernel, a depthwise 3x3 and a 1x1 a dense "
        "3x3, a bottleneck a wide one. Or they save no operator, or need more of one for less of the other and gain "
        "less than machines differ by.",
        "Nothing to do: the report shows both estimates. `convert --tune` times those that are close, --policy always "
        "merges all the same.",
    ),
    "decides-by-size": Explanation(
        "a forward that decides by a size of its input",
        "The forward compares a size, or uses it as a key or a text, with the same outcome at all sizes that were "
        "tried: for an input of another size it may do something else. What it calls is merged for itself.",
        "Nothing to do: the result is right as it is. If the block is yours: move the decision out of it.",
    ),
    "decides-by-value": Explanation(
        "a forward that asks what numbers a tensor holds",
        "The forward reads numbers of what it computes (bool(x), x.item(), x.numpy()), and may do something else for "
        "others. It stays as it is; what it calls is merged for itself.",
        "Nothing to do: the result is right as it is. If the block is yours: move the decision out of it.",
    ),
    "differs": Explanation(
        "a place with which the network computes something else",
        "Merged, this place gave another result on the example or at another size, or an error: code outside of it may "
        "ask for the modules or settings that it had. It is left alone.",
        "Nothing to do: the result is right as it is. Please report it, with the forward that is around the place.",
    ),
    "embedding": Explanation(
        "an embedding next to a layer",
        "An embedding takes rows of a table by number. The product of its table and the weight of the linear layer "
        "after it would be another table, with as many rows; repfuse merges maps of what a tensor holds, not tables.",
        "Nothing to do. If that table is small, compute it once yourself: embedding.weight @ linear.weight.T.",
    ),
    "excluded": Explanation(
        "a place that you left out",
        "The place could be merged, and stays as it is because --include or --exclude says so, or because the plan "
        "that was given does not hold it.",
        "Nothing to do where that is what you want. Else change the globs, or make the plan again.",
    ),
    "fake-quantised": Explanation(
        "a layer with simulated quantisation",
        "The value or the weight is rounded as the quantised model would round it. A value so rounded is no affine "
        "map, and a merged weight would have to be rounded anew.",
        "Convert before quantisation-aware training, or remove the fake quantisation first.",
    ),
    "fixed-scale": Explanation(
        "a value that cannot be scaled, because something else needs it as it is",
        "Equalising divides the values between two layers by positive numbers, channel by channel. This value is added "
        "to one that has to stay (what the network is given, or what an operator gives that takes no factors through "
        "itself), or the network returns it, or something outside of it reads it.",
        "Nothing to do: the result is right as it is. Quantise the layers around it per channel.",
    ),
    "hooks": Explanation(
        "a module with hooks",
        "A hook may change or record what goes through the module, its gradients, or what is saved of it. After the "
        "rewrite the module would be gone, and the hook with it, or the hook would see other values.",
        "Remove the hooks (handle.remove(), torch.nn.utils.prune.remove), then convert.",
    ),
    "in-place": Explanation(
        "a value that is overwritten in between",
        "An operation in place changes a tensor that this place, or something after it, reads. Computing the sum at "
        "once would read the tensor before or after the change, and not as the model does.",
        "Write the operation out of place: x = x + y instead of x += y, ReLU(inplace=False).",
    ),
    "input-statistics": Explanation(
        "a normalisation by the statistics of its own input, next to a layer",
        "LayerNorm, RMSNorm and GroupNorm divide by a number that they compute from each input, so they are no affine "
        "map. Their own weight and bias could go into the layer after them, which saves no operator.",
        "Nothing to do: the result is right as it is. Only a BatchNorm with frozen statistics goes into a weight.",
    ),
    "no-convolution": Explanation(
        "skips and normalisations without a convolution beside them",
        "There is no convolution to merge these into: a sum of skips and normalisations alone, or a normalisation that "
        "stands between an activation, a pool, a join or a sum and the next. As one depthwise 1x1 convolution they "
        "would hardly be faster.",
        "Nothing to do: the result is right as it is.",
    ),
    "not-homogeneous": Explanation(
        "an operator that takes no positive factor through itself, between two layers",
        "Equalising is exact across f where f(s x) = s f(x) for every positive s in each channel: ReLU, LeakyReLU, "
        "PReLU, pools, sums, joins, shuffles. It is not across ReLU6, sigmoid, SiLU, GELU, softmax, LayerNorm or a "
        "product of two values.",
        "Nothing to do: the result is right as it is. For int8, train with ReLU, or quantise these layers per channel.",
    ),
    "outermost-class": Explanation(
        "a merge in the model's own forward, for which it would lose its class",
        "The place stands in the forward of the outermost module itself, which would become another module for it, "
        "without its class and the methods of that. Less than 5 % of the predicted time would be saved, or "
        "--keep-class asks to leave it.",
        "Nothing to do, or --drop-class (keep_class=False in Python) where nobody needs the class.",
    ),
    "outer-reference": Explanation(
        "a block that uses values it is not given",
        "The forward of the block reads a parameter or a tensor of another module other than through its arguments, "
        "so it cannot be rewritten on its own.",
        "Pass the value as an argument, or register the parameter in the block.",
    ),
    "overflow": Explanation(
        "a fused weight that is too large for its format",
        "The scale of a normalisation or a factor is so large that the product leaves the range of the dtype that the "
        "weights are stored in: float16 ends at 65504. Stored, it would be infinite.",
        "Convert the checkpoint in a format of larger range, such as bfloat16 or float32.",
    ),
    "padding-between": Explanation(
        "zero padding between two layers in a row",
        "The second layer pads the result of the first with zeros, but the first, continued beyond its border, is not "
        "constant there: it is a kernel of more than one pixel, or a crop. One convolution would see that continuation "
        "instead of the zeros, and the border would be wrong.",
        "Nothing to do here. When you design the block: pad once, before the first of the layers.",
    ),
    "padding-mode": Explanation(
        "a padding that is not zeros, in a sum or between layers",
        "With reflect, replicate or circular padding the value outside of the image depends on the image. A 1x1 "
        "branch or a skip reads no padding, so at the border the branches see different sources.",
        "A normalisation alone is still folded in. For the sum, train with zero padding.",
    ),
    "policy": Explanation(
        "layers in a row, which --policy never-compose leaves alone",
        "The layers can be one, but the policy is to merge branches, normalisations and constants only.",
        "Convert with --policy cost to compose layers where that is predicted to be faster.",
    ),
    "pool-ceil": Explanation(
        "an average pool whose size is rounded up",
        "With ceil_mode=True and a stride the last window of some input sizes hangs over the edge: the output is then "
        "larger, and that window is divided by less. At other sizes nothing shows.",
        "Use ceil_mode=False where the input size allows it, or pad explicitly.",
    ),
    "pool-padding": Explanation(
        "an average pool that does not count its padding",
        "With count_include_pad=False a window at the border is divided by fewer pixels than one inside, so its "
        "weights differ from place to place and no one kernel holds them.",
        "Use count_include_pad=True when you train, or padding=0 after an explicit pad.",
    ),
    "reserved-name": Explanation(
        "a block with a child of a name that torch.fx needs",
        "The block would have to become a torch.fx.GraphModule, which has members of its own called graph and code.",
        "Give the child another name.",
    ),
    "several-sources": Explanation(
        "a layer on top of maps of several sources",
        "What the layer, the normalisation or the concatenation reads joins branches of different tensors. Each source "
        "keeps a convolution of its own, and what comes after stays.",
        "Nothing to do: the branches of each source are merged for themselves.",
    ),
    "shift-before-padding": Explanation(
        "a constant before a convolution that pads with something else",
        "The padding is added after a normalisation, a bias or an average. Folded into the convolution, the constant "
        "would reach into the padding, and the border would be wrong by its size (measured: up to 13 %). It is exact "
        "where the padding is filled with that very constant, as some blocks do on purpose, and with a channel of ones "
        "beside the input, whose weight is the constant: that is done where it is clearly predicted to be faster.",
        "Nothing to do here. When you design the block: put the normalisation after the convolution, or pad before it.",
    ),
    "size-dependent-slice": Explanation(
        "a slice that counts from the other side",
        "With x[..., :5] or x[..., -5:] what is cut off depends on the size of the input. A convolution cuts off the "
        "same amount at every size.",
        "Count from the side that is cut: x[..., 1:-1] is a crop that merges.",
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
    "transposed-convolution": Explanation(
        "a transposed convolution in a row with a convolution that has a stride",
        "A transposed convolution of stride 2 writes two pixels for each that it reads, and a convolution of stride 2 "
        "writes one for two. In a row they may read or write at other places of their kernels from pixel to pixel. "
        "Sums of transposed convolutions, and layers of stride 1 before and after one, do merge.",
        "Nothing to do: the result is right as it is.",
    ),
    "unseen-operation": Explanation(
        "a tensor that no function of torch was seen to make",
        "In this forward a tensor appears that came out of compiled code, another library or another thread. What that "
        "code read cannot be seen, so nothing is merged across it. What the forward calls is merged for itself.",
        "Nothing to do. If the block is yours: compute with functions of torch, or give the part a module of its own.",
    ),
    "unwritable-weight": Explanation(
        "a weight that cannot be rescaled by itself",
        "Equalising rescales weights. This one is computed in forward, shares its memory with another, or is read in "
        "another way as well, for which its scales would have to be others.",
        "Give the layer a weight of its own: a plain parameter.",
    ),
    "value-escapes": Explanation(
        "a value that something else reads too",
        "The branch could be merged, but its result is also used elsewhere, so it has to be computed in any case.",
        "Nothing to do: the result is right as it is.",
    ),
    "writes-state": Explanation(
        "a forward that changes what its module holds",
        "The forward stores a value or a setting on the module, or switches gradients, in each call. A graph in its "
        "place would not, or what is read from there is no constant. What it calls is merged for itself.",
        "Nothing to do where that is the idea. Else let forward return the value instead of storing it.",
    ),
}
