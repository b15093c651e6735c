"""Tensors of ONNX as torch's, over the same memory: what is in a file beside the model stays there until it is read."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor over the memory of an array."""
    held = np.ascontiguousarray(array).reshape(array.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nobody may write there: nobody does
        if held.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(held.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(held)


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return an array over the memory of a tensor."""
    held = tensor.detach().cpu().contiguous()
    if held.dtype is torch.bfloat16:
        return held.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return held.numpy()
