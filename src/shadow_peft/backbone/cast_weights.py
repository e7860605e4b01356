"""A backbone whose linear layers hold their weights in half precision, for many passes under autocast.

Autocast casts the float32 weights of a product in every pass. The view made here shares every tensor and module with the
backbone but the weights of its linear layers, which are cast as autocast would cast them; results are bit for bit the same.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from shadow_peft.layers.casts import cast, casts_once, derived


def with_cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with cast weights, inside `layers.casts.cast_once()`; elsewhere the module itself.

    So it is also where accelerate has bound a forward of its own to a part.
    """
    parts = list(module.modules()) if casts_once() else []
    if not parts or any("forward" in vars(part) for part in parts):
        return module
    weights = [part.get_parameter("weight") for part in parts if _is_product(part)]
    view: nn.Module = derived(("view", dtype, module.training, *map(id, parts)), weights, lambda: _view(module, dtype))
    return view


def _is_product(part: nn.Module) -> bool:
    return type(part) in (nn.Linear, Conv1D) and part.get_parameter("weight").dtype == torch.float32


def _view(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    view = copy.copy(module)
    view._modules = {name: None if part is None else _view(part, dtype) for name, part in module._modules.items()}
    if _is_product(module):
        view._parameters = {**module._parameters, "weight": cast(module.get_parameter("weight"), dtype)}  # type: ignore[dict-item]
    return view
