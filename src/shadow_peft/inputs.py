"""The arguments of one forward call, made ready for base and backbone alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shadow_peft.backbone.explicit import Signature
from shadow_peft.cache import ShadowCache, StatePair


@dataclass(frozen=True)
class Call:
    """One forward call.

    Attributes:
        input_ids: token ids `[B, T]`, or None.
        inputs_embeds: embeddings `[B, T, d]`, or None.
        attention_mask: 1 for tokens, 0 for padding, `[B, P + T]` with P cached tokens; other shapes are handed on.
        position_ids: positions `[B, T]`, or None.
        cache: the states of base and backbone from an earlier call, or None.
        use_cache: whether states are returned.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: ShadowCache | StatePair | None
    use_cache: bool

    @classmethod
    def of(
        cls,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: ShadowCache | StatePair | None,
        use_cache: bool,
        first_position: int = 0,
    ) -> Call:
        """A call with positions counted from the mask, `first_position` being that of the first token.

        Raises:
            ValueError: neither or both of tokens and embeddings.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions(attention_mask, tokens.shape[1]) + first_position
        return cls(input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache)

    @property
    def length(self) -> int:
        """Number of tokens T."""
        return next(iter(self.tokens.values())).shape[1]

    def without_first(self, count: int) -> Call:
        """The same call without its first tokens, which the backbone has read already."""
        if count == 0:
            return self
        given = {name: getattr(self, name) for name in ("input_ids", "inputs_embeds", "position_ids")}
        cut: dict[str, Any] = {name: value[:, count:] for name, value in given.items() if value is not None}
        return replace(self, **cut)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The tokens as the base takes them."""
        if self.inputs_embeds is not None:
            return {"inputs_embeds": self.inputs_embeds}
        assert self.input_ids is not None
        return {"input_ids": self.input_ids}

    def arguments(self, signature: Signature, cache: Any) -> dict[str, Any]:
        """Mask, positions and cache, those that a model's forward knows, under its names."""
        mask = self.attention_mask
        if signature.is_recurrent and mask is not None and mask.dim() == 2:
            mask = mask[:, -next(iter(self.tokens.values())).shape[1] :]
        arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": self.position_ids}
        if signature.cache_name is not None:
            arguments |= {signature.cache_name: cache, "use_cache": self.use_cache}
        return signature.accepted(arguments)


def positions(attention_mask: Tensor, length: int) -> Tensor:
    """Positions `[B, T]` of the last `length` tokens, counted from the first token that is no padding.

    Tokens are counted without the padding between them, as `generate` does. Padding itself is numbered too, from the same
    origin, so that a sequence padded on the right has the positions of a sequence that is not padded.
    """
    real = attention_mask.bool()
    order = torch.arange(real.shape[1], device=real.device)
    numbered = torch.where(real, real.long().cumsum(-1) - 1, order - real.long().argmax(-1, keepdim=True))
    return numbered.clamp(min=0)[:, -length:]
