"""Which networks run in one call, and what they computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

InferenceMode = Literal["base_shadow", "shadow_only"]
Mode = Literal["base_shadow", "shadow_only", "base_only"]


@dataclass
class AdaptedOutput:
    """What base and shadow computed in one call of `ShadowPeftModel.run`.

    Attributes:
        base: the base's outputs, or those of its backbone with `skip_head`; None in "shadow_only".
        shadow_state: the initial shadow state s `[B, T, d]`; None in "base_only".
        head_input: the final hidden state `[B, T, d]`, with `keep_head_input`.
        cache: the cache of every network that ran, or None.
    """

    base: Any = None
    shadow_state: Tensor | None = None
    head_input: Tensor | None = None
    cache: Any = None
