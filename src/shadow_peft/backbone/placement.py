"""A model on another device or in another dtype, as transformers loads it there."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_EXACT = "inv_freq"
"""How the buffers end that transformers computes in float32 whatever a model is loaded in."""


def place(model: Model, dtype: torch.dtype, device: torch.device | None = None) -> Model:
    """Move and cast a model in place; rotary frequencies are moved and not rounded.

    `nn.Module.to` would round them: in bfloat16 a frequency is off by up to 0.2 %, and after a thousand tokens by a radian,
    while a model that is loaded in bfloat16 has them in float32.
    """
    exact = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith(_EXACT)
    ]
    model.to(device, dtype)
    for module, name, buffer in exact:
        cast: Tensor = module.get_buffer(name)
        module._buffers[name] = buffer.to(cast.device)
    return model
