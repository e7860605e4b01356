"""Optimizer groups: a learning rate of its own for the backbone, and no weight decay for norms, biases and vectors.

    backbone, projection      shadow_learning_rate_scale * learning_rate
    everything else           learning_rate
    norms, biases, vectors    no weight decay

A pretrained backbone may want a smaller rate than weights that start at zero: try 1 and 0.3. Schedulers
of torch and transformers multiply the rate of each group, so the ratio stays the same during the run.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from shadow_peft.adapter import ShadowAdapter


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, shadow_learning_rate_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters, each parameter in exactly one, for any `torch.optim` optimizer.

    Args:
        model: a task model or a `ShadowPeftModel`, also inside a wrapper such as `DistributedDataParallel`.
        learning_rate: rate of everything except the backbone and its projection.
        weight_decay: decay of matrices; norms, biases and 1-d parameters have none.
        shadow_learning_rate_scale: rate of the backbone and its projection, in units of `learning_rate`.

    Returns:
        At most four groups with `params`, `lr` and `weight_decay`; those at `learning_rate` come first, since trainers log
        the rate of the first group.

    Raises:
        TypeError: the model has no shadow adapter.
        ValueError: the scale is negative or not finite, or no parameter is trainable.
    """
    if not (math.isfinite(shadow_learning_rate_scale) and shadow_learning_rate_scale >= 0):
        raise ValueError(f"shadow_learning_rate_scale must be a number of at least 0, got {shadow_learning_rate_scale}.")
    shadow = {id(p) for part in _backbones(model) for p in part.parameters()}
    bare = _undecayed(model)
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault((id(parameter) in shadow, id(parameter) in bare), []).append(parameter)
    if not members:
        raise ValueError("No parameter is trainable. Load the adapter with is_trainable=True to train it.")
    return [
        {
            "params": parameters,
            "lr": learning_rate * (shadow_learning_rate_scale if in_shadow else 1.0),
            "weight_decay": 0.0 if is_bare else weight_decay,
        }
        for (in_shadow, is_bare), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _backbones(model: nn.Module) -> list[nn.Module]:
    adapted = [module for module in model.modules() if isinstance(module, ShadowAdapter)]
    if not adapted:
        raise TypeError(f"{type(model).__name__} holds no shadow adapter; wrap the base with get_shadow_model first.")
    return [part for m in adapted for part in (m.shadow_model, m.shadow_hidden_projection)]


def _undecayed(model: nn.Module) -> set[int]:
    """Ids of the parameters of norms, of biases (stacked biases included, which are matrices) and of vectors."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim < 2 or name.endswith("bias") or "norm" in type(module).__name__.lower()
    }
