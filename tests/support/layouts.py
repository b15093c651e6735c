"""Training checkpoints as their libraries write them, of one small network, with objects of classes made up here.

The libraries need not be installed: a class is made under their module's name, pickled, and forgotten again.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any

import numpy as np
import torch
from support.networks import digits
from torch import Tensor, nn

MODEL = "repfuse.samples:DigitsRepVGG"
ARGUMENTS = ["width=4"]
WEIGHTS = ("--model", MODEL, "--model-arg", "width=4")


TRAINED, AVERAGED = digits(0), digits(1)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@contextmanager
def foreign(module: str, name: str, base: type = object) -> Iterator[type]:
    """A class ``module.name`` for as long as the file is written."""
    parts = module.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    made = {key: ModuleType(key) for key in names if key not in sys.modules}
    sys.modules.update(made)
    cls = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, cls)
    try:
        yield cls
    finally:
        for key in made:
            del sys.modules[key]


def prefixed(prefix: str, of: nn.Module) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in of.state_dict().items())


def optimizer() -> dict[str, Any]:
    return torch.optim.SGD(TRAINED.parameters(), lr=0.1).state_dict()


def timm(path: Path) -> None:
    """timm.utils.CheckpointSaver with --model-ema."""
    args = argparse.Namespace(model="repvgg", lr=0.1, data_dir=Path("/data"), opt_betas=None)
    content = {
        "epoch": 7,
        "arch": "repvgg",
        "state_dict": prefixed("module.", TRAINED),
        "optimizer": optimizer(),
        "version": 2,
        "args": args,
        "amp_scaler": {"scale": 1.0},
        "state_dict_ema": AVERAGED.state_dict(),
        "metric": np.float64(81.5),
    }
    torch.save(content, path)


def lightning(path: Path) -> None:
    """pytorch_lightning.Trainer.save_checkpoint, with save_hyperparameters and a ModelCheckpoint."""
    state = prefixed("net.", TRAINED) | {"criterion.weight": torch.ones(10), "accuracy.total": torch.tensor(3)}
    with foreign("pytorch_lightning.utilities.parsing", "AttributeDict", dict) as settings:
        content = {
            "epoch": 7,
            "global_step": 100,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 8}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'a.b'}": {"best_model_score": torch.tensor(0.9), "path": "x"}},
            "optimizer_states": [optimizer()],
            "lr_schedulers": [{"last_epoch": 7}],
            "hparams_name": "kwargs",
            "hyper_parameters": settings(width=4, lr=0.1, tags=["a"]),
        }
        torch.save(content, path)


def lightning_averaged(path: Path) -> None:
    """The same with the callback WeightAveraging, which exchanges the weights when it saves."""
    content = {
        "epoch": 7,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": prefixed("net.", AVERAGED),
        "current_model_state": prefixed("net.", TRAINED),
        "averaging_state": {"n_averaged": torch.tensor(9)},
    }
    torch.save(content, path)


def mmengine(path: Path) -> None:
    """mmengine.Runner.save_checkpoint with EMAHook, which exchanges the weights when it saves."""
    with foreign("mmengine.logging.history_buffer", "HistoryBuffer") as buffer:
        losses = buffer()
        vars(losses).update(_log_history=np.ones(3), max_length=1000)
        content = {
            "meta": {
                "epoch": 7,
                "cfg": "model = dict()",
                "seed": np.int64(3),
                "time": "20260101_000000",
                "mmengine_version": "0.10.4",
                "dataset_meta": {"classes": ("a", "b"), "palette": np.zeros((2, 3), np.uint8)},
            },
            "state_dict": prefixed("backbone.", AVERAGED) | {"data_preprocessor.mean": torch.ones(3, 1, 1)},
            "ema_state_dict": prefixed("module.backbone.", TRAINED) | {"steps": torch.tensor(5)},
            "message_hub": {"log_scalars": OrderedDict(loss=losses), "runtime_info": {"iter": 5}},
            "optimizer": optimizer(),
            "param_schedulers": [{"last_step": 5}],
        }
        torch.save(content, path)


def yolo(path: Path) -> None:
    """ultralytics: modules in half precision, the averaged one beside the trained one."""
    content = {
        "epoch": -1,
        "best_fitness": np.array([0.7]),
        "model": digits(0).half(),
        "ema": digits(1).half(),
        "updates": 1234,
        "optimizer": None,
        "train_args": {"imgsz": 640, "project": PureWindowsPath(r"runs\train")},
        "date": datetime.datetime(2026, 1, 2, 3, 4, 5, 6).isoformat(),
        "git": defaultdict(list, branch=["main"]),
    }
    torch.save(content, path)


def compiled(path: Path) -> None:
    """A training loop of one's own: AveragedModel of DataParallel of a network whose body alone is compiled."""
    whole = digits(1)
    whole.blocks = torch.compile(whole.blocks)
    average = torch.optim.swa_utils.AveragedModel(nn.DataParallel(whole))
    content = {
        "options": argparse.Namespace(seed=1, where=Path("/data")),
        "rng": ("MT19937", np.arange(624, dtype=np.uint32), 3, 0, 0.5),
        "model": TRAINED.state_dict(),
        "model_ema": average.state_dict(),
    }
    torch.save(content, path)


WRITERS = {writer.__name__: writer for writer in (timm, lightning, lightning_averaged, mmengine, yolo, compiled)}
