"""What stands around the network in a file, and goes with it into the file that is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repfuse.checkpoint.inert import is_plain

if TYPE_CHECKING:
    from torch import Tensor

KEYS = (  # averaged weights first, as timm and YOLO do: they are the ones that are evaluated and shipped
    *("state_dict_ema", "model_ema", "ema", "params_ema", "ema_state_dict"),
    *("state_dict", "model_state_dict", "model", "module", "params", "net"),
)
TRAINING = ("optim", "scaler", "scheduler")  # parts of the keys of training state


@dataclass(frozen=True)
class Around:
    """The layout of a file without its network.

    ``prefix`` stands before each name of a state dict, ``extras`` are entries of it that belong to the wrapper whose
    prefix that is. ``keys`` lead to the network in the dictionaries of a training checkpoint (none where it is bare),
    ``others`` is the rest of that, as far as it stays true; ``left_out`` names what does not.
    """

    prefix: str = ""
    extras: dict[str, Tensor] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    others: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def put(self, network: Any) -> Any:
        """Return the data to write: ``network``, inside the training checkpoint where there was one."""
        for key in reversed(self.keys[1:]):
            network = {key: network}
        return self.others | {self.keys[0]: network} if self.keys else network

    def take(self, data: Any) -> Any:
        """Return the network in ``data``: the inverse of ``put``."""
        for key in self.keys:
            data = data[key]
        return data


def around(container: dict[str, Any], keys: tuple[str, ...], prefix: str, extras: dict[str, Tensor]) -> Around:
    """Return the layout of a training checkpoint.

    Left out of it are the state of the optimizer and other copies of the weights, which no longer fit a fused network,
    and whatever is not plain data.
    """
    rest = {key: value for key, value in container.items() if key != keys[0]}
    others = {key: value for key, value in rest.items() if _stays(key, value)}
    return Around(prefix, extras, keys, others, tuple(str(key) for key in rest if key not in others))


def _stays(key: Any, value: Any) -> bool:
    stale = value is not None and (key in KEYS or any(part in str(key).lower() for part in TRAINING))
    return not stale and is_plain(value)
