"""The arguments of one forward call, made ready for base and backbone alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shadow_peft.base.signature import Signature
from shadow_peft.cache import ShadowCache


@dataclass(frozen=True)
class ModelInputs:
    """One forward call.

    Attributes:
        input_ids: token ids `[B, T]`, or None.
        inputs_embeds: embeddings `[B, T, d]`, or None.
        attention_mask: 1 for tokens, 0 for padding, `[B, P + T]` with P cached tokens; other shapes are passed on.
        position_ids: positions `[B, T]`, or None.
        cache: the cache that the caller passes; once ready, that of base and backbone, or None.
        use_cache: whether the cache is returned; None leaves it to the base's config.
        extra: whatever else the base's forward takes.
        adapter_names: the adapter of each row; None for the active one.
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cache: Any = None
    use_cache: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    adapter_names: tuple[str, ...] | None = None

    def checked(self) -> ModelInputs:
        """The same inputs.

        Raises:
            ValueError: neither or both of tokens and embeddings.
        """
        if (self.input_ids is None) == (self.inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        return self

    def with_positions(self, first_position: int) -> ModelInputs:
        """The same inputs with positions counted from the mask, `first_position` being that of the first token."""
        mask = self.attention_mask
        if self.position_ids is not None or mask is None or mask.dim() != 2:
            return self
        return replace(self, position_ids=positions(mask, self.length) + first_position)

    @property
    def length(self) -> int:
        """Number of tokens T."""
        return next(iter(self.tokens.values())).shape[1]

    def without_first(self, count: int) -> ModelInputs:
        """The same inputs without their first tokens, which the backbone has read already."""
        if count == 0:
            return self
        per_token = {name: getattr(self, name) for name in ("input_ids", "inputs_embeds", "position_ids")}
        rest: dict[str, Any] = {name: value[:, count:] for name, value in per_token.items() if value is not None}
        return replace(self, **rest)

    @property
    def num_rows(self) -> int:
        """Number of rows B."""
        return next(iter(self.tokens.values())).shape[0]

    def select_rows(self, rows: Sequence[int]) -> ModelInputs:
        """The same inputs for some rows; what has one row for all, or none, stays."""
        count = self.num_rows
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        chosen: dict[str, Any] = {name: _rows_of(getattr(self, name), rows, count) for name in names}
        if self.position_ids is not None and _has_kinds(self.position_ids, count):  # also where n is B
            chosen["position_ids"] = self.position_ids[:, list(rows)]
        extra = {name: _rows_of(value, rows, count) for name, value in self.extra.items()}
        return replace(self, **chosen, extra=extra)

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
            mask = mask[:, -self.length :]
        arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": self.position_ids}
        if signature.cache_name is not None:
            arguments |= {signature.cache_name: cache, "use_cache": self.use_cache}
        return signature.accepted(arguments)


def _rows_of(value: Any, rows: Sequence[int], count: int) -> Any:
    """Rows of a tensor `[B, ...]`, or `[n, B, T]` like positions of several kinds; of a dictionary of such; else itself."""
    if isinstance(value, dict):
        return {name: _rows_of(entry, rows, count) for name, entry in value.items()}
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    index = torch.tensor(rows, device=value.device)
    if value.shape[0] == count:
        return value.index_select(0, index)
    return value.index_select(1, index) if _has_kinds(value, count) else value


def _has_kinds(value: Tensor | None, count: int) -> bool:
    """Whether a tensor is `[n, B, T]`, as positions of several kinds are."""
    return value is not None and value.dim() == 3 and value.shape[1] == count


def positions(attention_mask: Tensor, length: int) -> Tensor:
    """Positions `[B, T]` of the last `length` tokens, counted from the first token that is no padding.

    Tokens are counted without the padding between them, as `generate` does. Padding itself is numbered too, from the same
    origin, so that a sequence padded on the right has the positions of a sequence that is not padded.
    """
    real = attention_mask.bool()
    order = torch.arange(real.shape[1], device=real.device)
    numbered = torch.where(real, real.long().cumsum(-1) - 1, order - real.long().argmax(-1, keepdim=True))
    return numbered.clamp(min=0)[:, -length:]


def with_drafted(inputs: ModelInputs, run: Callable[[ModelInputs], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Shadow states `[B, T, d]` of a call and the backbones' cache, where drafting may have computed the first states.

    Args:
        inputs: the arguments of the call.
        run: runs the backbones on tokens that they have not read yet.
    """
    cache = inputs.cache if isinstance(inputs.cache, ShadowCache) else None
    if cache is None or cache.drafted is None:
        return run(inputs)
    drafted, cache.drafted = cache.drafted, None
    rest = inputs.without_first(drafted.states.shape[1])
    if rest.length == 0:
        return drafted.states, cache.shadow
    state, backbone_cache = run(rest)
    return torch.cat([drafted.states, state], dim=1), backbone_cache
