"""Weights that say how their network is built, in words that repfuse must not follow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from repfuse.samples import NotebookBlock

from .attack import Attack, Make

GOOD: dict[str, Any] = {
    "repfuse": "0",
    "schema": 1,
    "model": "repfuse.samples:NotebookBlock",
    "model_args": [],
    "input": "1x3x8x8",
    "plans": [],
}


def written(text: Any, *, torch_file: bool = False) -> bytes:
    state = NotebookBlock().state_dict()
    if not torch_file:
        return save(dict(state), {"repfuse": text})
    state.repfuse = text
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def recipe(*, may_load: bool = False, **changes: Any) -> Attack:
    return Attack(lambda _folder, _canary: written(json.dumps(GOOD | changes)), may_load=may_load)


def raw(text: Any, **options: Any) -> Attack:
    return Attack(lambda _folder, _canary: written(text, **options))


def from_file(spec: str) -> Make:
    def make(folder: Path, canary: Path) -> bytes:
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\ndef net(): pass\n")
        return written(json.dumps(GOOD | {"model": spec.format(folder=folder)}))

    return make


def timm(*arguments: str) -> Attack:
    return recipe(model="timm:repvgg_a0", model_args=list(arguments))


CALLS = (
    *("torch.hub:load", "torch:load", "os:system", "builtins:exec", "torch.nn:Identity", "torch.nn.modules:os"),
    "torch.nn.functional:relu",
    *("repfuse.samples:torch.hub.load", "repfuse.samples:nn", "hf-hub:evil/net", "https://example.invalid/net.py:net"),
    *("timm:../x", "timm:hf-hub:evil/net", "timm:local-dir:/x", "timm.models:create_model", "torchvision:os"),
    *("timm.models._hub:load_state_dict_from_hf", "torchvision.models:list_models"),
    *("", ":", "a:b:c", "-:-", "\0:x", "x" * 100_000),
)
RECIPES = {
    "a file": Attack(from_file("{folder}/evil.py:net"), executes=True),
    "a module": Attack(from_file("evil:net"), executes=True),
    **{f"a call of {spec!r:.60}": recipe(model=spec) for spec in CALLS},
    "weights from elsewhere": timm("pretrained=True", "checkpoint_path=/etc/passwd"),
    "weights by configuration": timm("pretrained_cfg={'url':'https://example.invalid'}"),
    "an argument that is code": timm("num_classes=__import__('os').getpid()"),
    "an argument without end": timm("num_classes=" + "[" * 100_000),
    "an argument that is a power": timm("num_classes=9**9**9"),
    "a network of 2**40 classes": timm("num_classes=1099511627776"),
    "a network with 2**40 inputs": timm("in_chans=1099511627776"),
    "another network": recipe(model="repfuse.samples:DigitsRepVGG"),
    "a network of no size": recipe(model_args=["channels=0"]),
    "a network of negative size": recipe(model_args=["channels=-5"]),
    "a network of 2**60 channels": recipe(model_args=["channels=1152921504606846976"]),
    "a network of a million channels": recipe(model_args=["channels=100000"]),
    "an input of terabytes": recipe(input="1x3x1000000x1000000"),
    "an input of ten gigabytes": recipe(input="1x3x30000x30000"),
    "an input with a million digits": recipe(input="1x" + "9" * 1_000_000),
    "an input of a million axes": recipe(input="x".join(["1"] * 100_000), may_load=True),
    "many inputs": recipe(input=",".join(["1x3x1000x1000"] * 1000)),
    "an input of a strange dtype": recipe(input="1x3x8x8:float4_e2m1fn_x2"),
    "an input that is none": recipe(input="os.system"),
    "an input that is a list": recipe(input=[1, 3]),
    "another schema": recipe(schema=10**30),
    "a schema that is a list": recipe(schema=[[]]),
    "plans that are text": recipe(plans="x"),
    "plans of text": recipe(plans=["x"]),
    "plans of nothing": recipe(plans=[None, {}]),
    "a plan of nonsense": recipe(plans=[{"sites": [{"x": 1}], "refusals": [], "signature": "x"}]),
    "plans of plans": recipe(plans=[[{"sites": []}]]),
    "arguments that are numbers": recipe(model_args=[1, None]),
    "arguments that are text": recipe(model_args="xx"),
    "a model that is a number": recipe(model=7),
    "a list": raw("[]"),
    "a number": raw("7"),
    "no JSON": raw("{"),
    "NaN": raw('{"schema": NaN}'),
    "nested without end": raw("[" * 100_000),
    "a number with a million digits": raw('{"schema": ' + "9" * 1_000_000 + "}"),
    "text of ten megabytes": raw(json.dumps(GOOD | {"model": "x" * 10_000_000})),
    "control characters": recipe(model="\x1b]0;owned\x07:x"),
    "in a torch file: a list": raw([1], torch_file=True),
    "in a torch file: bytes": raw(b"{}", torch_file=True),
    "in a torch file: no JSON": raw("{", torch_file=True),
    "in a torch file: a tensor": raw(torch.ones(2), torch_file=True),
}
