"""Builds a contender or an ablation by its name, and checks its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.quality.methods import Contender
from benchmarks.quality.real.ablations import ABLATIONS
from benchmarks.quality.real.contenders import AUTOCAST, BASE_PARAMETERS, BUDGET, METHODS, TOLERANCE, WIDTH
from benchmarks.quality.scoring import Inputs


def all_methods() -> dict[str, Callable[[Any], Contender]]:
    """The contenders and the ablations, by name."""
    return {**METHODS, **ABLATIONS}


def build(method: str, base: Any, seed: int) -> Contender:
    """A fresh contender on a base that is its own, its trained parameters in float32.

    Raises:
        ValueError: it does not train 3 % of SmolLM2-135M. A base of another size, as tests have it, is not held to a share.
    """
    torch.manual_seed(seed)
    is_real = abs(sum(p.numel() for p in base.parameters()) - BASE_PARAMETERS) <= 2 * WIDTH  # a classifier has a head
    contender = all_methods()[method](base)
    for parameter in contender.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if method in AUTOCAST:
        contender = under_autocast(contender, base.device.type)
    if is_real and abs(contender.trainable / BUDGET - 1) > TOLERANCE:
        raise ValueError(f"{method} trains {contender.trainable:,} parameters, not {BUDGET:,} within {TOLERANCE:.0%}.")
    return contender


def under_autocast(contender: Contender, device: str) -> Contender:
    """The same contender, whose forward runs under autocast to bfloat16, in training and when it is scored."""
    model: Any = contender.model
    forward, logits = model.forward, contender.logits

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return forward(*args, **kwargs)

    def autocast_logits(inputs: Inputs) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return logits(inputs)

    model.forward = autocast_forward
    return replace(contender, logits=autocast_logits)
