"""What one may want to know before or after a run: ``repfuse explain TOPIC`` reads this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A subject in one paragraph (``opening``) and its parts by name (``points``)."""

    title: str
    opening: str
    points: dict[str, str]


TOPICS: dict[str, Topic] = {
    "merges": Topic(
        "what merges, and what is rewritten",
        "Whatever computes a sum of affine, shift-equivariant maps of one tensor is one convolution, in 1-d, 2-d and "
        "3-d and for linear layers, spelled with modules, functions, operators, tensor methods or ATen (torch.export).",
        {
            "sums": "Of any number and nesting, with factors. Of several tensors: what shares its source merges, the "
            "rest stays.",
            "kernels": "Of different sizes, dilations, paddings and groups in one sum; crops and steps "
            "(x[:, :, 1:-1]).",
            "norms": "With frozen statistics: after a branch, on the skip, after the sum, before what does not pad; "
            "layer scales, shifts, frozen arithmetic.",
            "neutral": "0 + x, x - 0, x * 1 and zeros made in forward go where they stand beside a merge.",
            "in a row": "1x1, 3x3, 1x1; pads, average pools and frozen filters, where the border allows it and it is "
            "predicted to be faster.",
            "transposed": "Transposed convolutions: sums of one stride; norms, scales, 1x1 and crops after them, "
            "scales and 1x1 without bias before them.",
            "channels": "cat, chunk, split, slices, index_select, repeat_interleave and shuffles between layers.",
            "rows": "Norms, 1x1 and linear layers across flatten, view, transpose, one pixel or token, and means over "
            "space or tokens, global or in windows.",
            "space": "Space to depth before a layer (pixel_unshuffle, slices joined, views), which refuses the sizes "
            "that it refused; norms across pixel_shuffle and interpolate, 1x1 across pixel_shuffle.",
            "weights": "Computed in forward from parameters alone: weight norm, masks, re-parameterised products, also "
            "written to .data or by copy_. They become plain weights.",
            "linear": "Parallel (LoRA), in a row, averaged heads, with BatchNorm1d; matmul, bmm, einsum with a "
            "constant.",
            "exactness": "Comes first. Zero-padding a value in between is exact only where that value is zero beyond "
            "its border, so a shift before a padded convolution, or two padded convolutions in a row, are refused.",
            "cost": "Comes second. Merging a depthwise 3x3 and a 1x1 is exact and slower, so it is declined with both "
            "estimates; so is what saves no operator, or buys less than 5 % with more arithmetic. --policy always "
            "overrules the estimate, --policy never-compose leaves layers in a row alone. The estimate is a model of "
            "arithmetic, memory and launches: `repfuse bench` measures.",
            "rewritten": "The smallest module that holds the place: new weights in the convolution that is there, or a "
            "stock convolution for a block. Only where a block does more than a row of modules does its forward become "
            "a GraphModule.",
            "never": "Across an activation; approximately. A bias or a shift before a transposed convolution stays, "
            "since zeros come between the pixels.",
        },
    ),
    "verdicts": Topic(
        "what each check allows, and what a verdict cannot say",
        "`convert` and `verify` print one table of checks: each with its largest error and what is allowed. -v adds "
        "where that was, the original's own error there, and every site. No tolerance is chosen by taste: proof, in "
        "float64, separates wrong algebra (1e-3) from rounding (1e-15); drift says what rounding did on this machine.",
        {
            "proof, sites": "The original's own operations and the fused convolution with weights that are not rounded "
            "yet, both in float64, on inputs from one pixel to beyond the kernel. Allowed: 1e-12 of the output's "
            "scale.",
            "proof, tensors": "Every stored weight and the one computed from the original in float64. Allowed: half a "
            "unit in the last place.",
            "proof, network": "The same in float64, on the example, odd, even, small and not square sizes, batches, "
            "impulses, a frame, large and nearly constant inputs. Allowed: 1e-12; more only where the "
            "order of summation explains it, measured.",
            "drift, sites": "The fused convolution in its stored dtype and the original in float64, element by "
            "element. Allowed: the a-priori bound of its arithmetic, from the number of terms, the unit roundoff and "
            "|W| * |x|.",
            "drift, network": "Both networks in their stored dtype and the original in float64. Allowed: six times "
            "what the original's own error and the rounding of the weights come to.",
            "as stored": "`verify` alone: both files in float64 with the weights that they hold. Allowed: what "
            "rounding each stored weight once does to the outputs, measured.",
            "the plan": "`verify` proves sites and tensors where it knows the plan: in the file, in the report beside "
            "it, or by --plan; then it names the first site that departs. A report or plan whose digests are not those "
            "of these files is left out, and that is said. Else it compares outputs, and bisects by module paths where "
            "they differ. --rtol and --atol overrule what rounding explains.",
            "same": "Without a plan: the difference is no larger than the rounding of the stored weights. A weight "
            "that is off by 1e-4 hides there in a deep float32 network, and much more in bfloat16; with the plan its "
            "last bit does not.",
            "could not tell": "Rounding alone explains everything, or the outputs are 0 or not finite.",
            "relative": "Errors are relative to the whole of an output: a quiet part of it, class scores beside "
            "coordinates in pixels, may be off by more of itself.",
            "values": "No finite number of inputs proves a forward that looks at its values: use --data for a network "
            "that branches on them. Settings of your own classes show in the outputs alone. Nothing is said about "
            "accuracy unless you bring labels.",
            "no float64": "A module that has none (a compiled kernel, a check of the dtype) runs in its own dtype: "
            "each site is proven in float64 all the same, the whole network is held to half of the digits, and the "
            "report says so.",
        },
    ),
    "files": Topic(
        "what is read, written and run of a checkpoint",
        "A file is recognised by its content. The written one takes its place only once a fresh process has read it "
        "again, found every tensor and setting as proven, and run it: ONNX in ONNX Runtime. A run that is killed "
        "leaves it whole or absent; a hidden .OUT.*.part goes with the next run to OUT.",
        {
            "read": "Pickled networks, state dicts, training checkpoints of timm, Lightning, MMEngine and YOLO, "
            "safetensors (also in shards), .pt2, snapshots of the Hugging Face hub, and TorchScript with --trust. "
            "In an ONNX graph what merges is replaced, and the rest stays word for word: names, free sizes, metadata, "
            "subgraphs, operators that repfuse does not know. It becomes an ONNX file and nothing else.",
            "written": "The layout of the file stays as it was; --drop-metadata writes the network alone. Exported "
            "programs keep their dynamic shapes and guards.",
            "weights": "The averaged ones of a training checkpoint where there are some; --weights chooses, and a note "
            "says which.",
            "again": "What a conversion was told (--input, --model) its report tells `verify` and `bench`; code of "
            "your own is named again.",
            "code": "Loading runs none of the file's. A pickle that names classes outside torch, torchvision, timm and "
            "repfuse needs --allow, which runs the code that it names: an installed package, a module where you stand "
            'or beside the file, or a script (what stands under `if __name__ == "__main__":` is left out; of a '
            "script without that, only what the classes refer to runs). A file that needs more is refused, unless you "
            "say --trust. Nothing is downloaded unless you name hf-hub:.",
            "hostile": "Refused: tensors far larger than their file (beyond 256 MiB and 8 times its size), archives "
            "that unpack to more than they are. A file made for it can still take much time or memory.",
            "images": "`verify --data` prepares a folder of images by the transforms that the model sources bring: "
            "timm's for a network with its configuration, also from the hub, torchvision's for its usual weights. "
            "Others are resized to cover the input and scaled to 0..1. A note says how; --mean and --std overrule. A "
            "folder per class gives the labels. The report has how often the best class and the best five agree, both "
            "accuracies, and by which margin a class changed.",
            "one process": "Where no other process could read the written file (a class of a notebook) it is read "
            "again in this one, and the report says so. REPFUSE_SAME_PROCESS=1 asks for that: it saves some seconds.",
        },
    ),
    "limits": Topic(
        "what repfuse does not do, and what it cannot see",
        "repfuse sees a network by running it: at the example, at one or two other sizes, and where a small example "
        "allows it at sizes a thousand larger. What a forward does at all of them is taken for what it does.",
        {
            "decisions": "Where a forward branches on a size or on values, writes into what it holds, or calls what "
            "PyTorch does not show (a ScriptModule, NumPy, threads), that call stays as it is with a refusal "
            "(decides-by-size, decides-by-value, writes-state, ...), and what it calls is still searched.",
            "silent sizes": "A decision by a number that Python makes of a size without telling (range(h), table[h], "
            '"%d" % h, math.log2(h)) is seen only where it fell otherwise at one of the recorded sizes.',
            "other branches": "A layer that a forward reaches into from a branch that no recorded run took may get new "
            "weights under it, if its own calls all merge: use `verify --data` for networks that branch on values.",
            "arguments": "A rewrite holds for the other arguments that the example gives: a switch that a rewritten "
            "forward is given keeps its value, and another value is an error.",
            "repeated calls": "A module that is called several times is rewritten once, for all its calls; where one "
            "of them could merge with what is around it and the others not, it is left as it is "
            "(called-differently).",
            "the class": "A network whose outermost forward is itself rewritten becomes a GraphModule: its data stays, "
            "the methods of its class do not, and the report says so. It happens only where more than 5 % of the time "
            "is predicted to be gained; --keep-class and --drop-class decide it. Hooks on a module that would be "
            "rewritten are a refusal.",
            "these weights": "Some merges hold for these weights only (a padding filled with the very bias). The plan "
            "says so (matching_borders), and is refused for weights that break it.",
            "inference": "Statistics are frozen, so the result is for inference: training it further means something "
            "else. --keep-affine leaves norms to train on (`repfuse explain int8`).",
            "rounding": "An exact result in float64 still rounds once when it is stored in float32 or half precision. "
            "The report shows that drift beside the original's own.",
            "hosts": "Libraries that fold every bn they find before they run a network (ultralytics, YOLOv5 to YOLOX) "
            "go on doing so: what is left under that name changes nothing. Other tools that look for a folded norm "
            "find an nn.Identity.",
            "memory": "`verify` and `convert` run your network over its own memory and stop a forward that would write "
            "into it; writes from threads that the forward starts, or from operators that deny them, are not seen.",
        },
    ),
    "int8": Topic(
        "why a merged network loses more to int8, and what to do",
        "A quantiser stores a kernel as multiples of one step, 127 of which reach its largest number: what is small "
        "beside that is lost. The numbers of a branch are of one size, and each branch has a step of its own; those "
        "of the sum are not, and it has one. The sum is exact, and needs more bits. repfuse is no quantiser: it says "
        "where that is, and writes files that lose less.",
        {
            "the middle tap": "A skip and a 1x1 are added to the middle of the 3x3 kernel alone, the skip to one "
            "input channel of each output: a few numbers many times as large as the rest. It is so in every channel, "
            "so steps per channel help little.",
            "the channels": "The scale of a norm, weight / sqrt(var + eps), goes into its channel of the kernel, and "
            "differs from channel to channel by large factors. With one step for all, small channels become 0. Steps "
            "per channel cure it.",
            "to see it": "`inspect` has a line on it, with -v a table, and the page a picture: the ranges of the "
            "channels before and after, and the signal-to-noise of the rounded weights. 6 dB are one bit. Noises of "
            "layers in a row add up, so each of n needs 10 + 10 log10(n) dB to leave 10 dB of all, at which a third "
            "of what comes out is noise. That is arithmetic on weights alone: `verify --bits 8 --data val/` runs both "
            "networks, and says which layer costs most.",
            "first": "Give weights steps per channel where the quantiser has them, and leave the worst layers in "
            "float.",
            "--equalize": "Where that does not do, and nothing is trained: moves scale between layers, across ReLU "
            "and the like, without changing what the network computes. It serves quantisers of one step per tensor, "
            "and the middle tap, which the scales of input channels reach (M. Nagel et al., arXiv 1906.04721). With "
            "steps per channel it can cost more than it gains: `verify --bits` says both.",
            "--keep-affine": "Where the network is trained on with simulated quantisation: the branches merge, and a "
            "BatchNorm stays behind the convolution, which has a range of 1 in each channel. With --data the norm has "
            "the statistics that training needs. What folds norms before it rounds undoes it. On training such "
            "networks: QARepVGG (arXiv 2212.01593), RepOpt (2205.15242), RepQ (2311.05317).",
            "the branches": "A network may also be quantised with them, at the cost of their time. What was trained "
            "with simulated quantisation is not merged (`repfuse explain fake-quantised`).",
            "torchao": "prepare_pt2e folds norms into convolutions first: --equalize. prepare_qat_pt2e trains with "
            "them: --keep-affine, with --data. https://docs.pytorch.org/ao/stable/pt2e_quantization/",
            "ONNX Runtime": "quantize_static has per_channel, which is off unless you say so. Exporters and its "
            "pre-processing fold norms: --equalize. https://onnxruntime.ai/docs/performance/model-optimizations/",
            "NNCF": "nncf.quantize takes PyTorch and ONNX; nncf.quantize_with_accuracy_control leaves layers in "
            "float. https://github.com/openvinotoolkit/nncf",
            "TensorRT": "Q/DQ pairs in the ONNX file say where and in which steps it rounds, symmetric ones. "
            "https://docs.nvidia.com/deeplearning/tensorrt/latest/",
        },
    ),
}
