"""ShadowCache: the base's cache and the backbone's cache as one object that travels with the call.

Everything between attention layers is per token, so these two are all the state that decoding needs. Whatever acts on
all layers of a cache (crop, reorder, repeat, select, reset) acts on both; questions about lengths are answered by the base's
cache, or by the backbone's where the base does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer, StaticCache


@dataclass(frozen=True)
class DraftedStates:
    """What drafting leaves for the pass that verifies it.

    Attributes:
        states: shadow states s `[B, k, d]` of the k tokens that the backbone has read and the base has not.
    """

    states: Tensor


class ShadowCache(Cache):
    """A pair of caches that generation handles as one.

    Args:
        base: the base's cache; None where only the shadow runs.
        shadow: the backbone's cache; None where only the base runs.

    Attributes:
        drafted: the states of tokens that the backbone's cache holds ahead of the base's; None if there are none.
        adapter_name: the adapter whose tokens it holds, where all rows have one.
        read_bare: whether the bare base has gone on with it. Lengths tell that too, where the shadow has a part.
    """

    def __init__(self, base: Cache | None, shadow: Cache | None) -> None:
        self.base = base
        self.shadow = shadow
        self.drafted: DraftedStates | None = None
        self.adapter_name: str | None = None
        self.read_bare = False

    @property
    def layers(self) -> list[Any]:
        """The layers of both caches, the base's first."""
        return [layer for part in self._parts for layer in part.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens held; where all layers are recurrent, and so count none, only an empty cache can tell."""
        held = self._parts[0]
        recurrent = all(isinstance(layer, LinearAttentionLayer) for layer in held.layers)
        if recurrent and not any(any(layer.has_previous_state.values()) for layer in held.layers):
            return 0
        return held.get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was, `[B]`."""
        for part in self._parts:
            part.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for part in self._parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in their order."""
        for part in self._parts:
            part.batch_select_indices(indices)

    def reset(self) -> None:
        """Hold no tokens."""
        super().reset()
        self.drafted, self.read_bare = None, False

    @property
    def _parts(self) -> list[Cache]:
        return [part for part in (self.base, self.shadow) if part is not None]

    def __repr__(self) -> str:
        return f"ShadowCache(base={self.base!r}, shadow={self.shadow!r})"


class StatePair(NamedTuple):
    """The states of base and backbone where an architecture keeps something else than a transformers cache."""

    base: Any
    shadow: Any


def make_shadow_cache(cache: Cache | None, config: PreTrainedConfig) -> Cache:
    """An empty cache for the backbone, of the kind of the base's: static beside static, dynamic beside all others.

    A backbone is a small part of the whole, so beside a quantized cache its own states stay exact.

    Args:
        cache: the base's cache, or None.
        config: the backbone's config.
    """
    if isinstance(cache, StaticCache):
        return StaticCache(config=config, max_cache_len=cache.get_max_length())
    return DynamicCache(config=config, offloading=cache is not None and cache.offloading)


def with_shadow_cache(
    cache: Any, counterpart: Callable[[Cache], Cache], alone: bool = False
) -> ShadowCache | StatePair | None:
    """The cache of both networks for a cache that a caller passes: an empty one gets an empty counterpart.

    Args:
        cache: what a caller passes, or None.
        counterpart: makes an empty cache for the shadow beside the base's.
        alone: the base runs without the shadow, which gets none.

    Raises:
        ValueError: no transformers cache, or one with tokens that the shadow has not seen.
    """
    if isinstance(cache, (ShadowCache, StatePair)) and cache.shadow is None and not alone:
        cache = without_shadow(cache)
    if cache is None or isinstance(cache, (ShadowCache, StatePair)):
        return cache
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values must be a transformers cache, got {type(cache).__name__}.")
    if cache.is_initialized and cache.get_seq_length() > 0:
        raise ValueError(
            f"This {type(cache).__name__} holds {cache.get_seq_length()} tokens that the shadow has not seen. Continue "
            "with the past_key_values that this model returned, or start with an empty cache."
        )
    return ShadowCache(cache, None if alone else counterpart(cache))


def without_shadow(cache: ShadowCache | StatePair) -> Any:
    """The base's part of a cache that was begun without a shadow that is to run now.

    Raises:
        ValueError: it holds tokens, which that shadow has not read.
    """
    if holds_tokens(cache):
        raise ValueError(
            "The shadow has not read the tokens of these past_key_values, since nothing needed it. Go on without it "
            "(output_shadow_logits=False, no drafts), or start with an empty cache."
        )
    return cache.base


def check_in_step(cache: Any) -> None:
    """Check that base and backbone have read the same tokens, before both read more.

    Caches in compiled graphs and on accelerators, whose lengths are tensors, are not asked.

    Raises:
        ValueError: one of them was used alone before.
    """
    if isinstance(cache, (ShadowCache, StatePair)) and cache.base is None:
        raise ValueError("These past_key_values hold tokens of the shadow alone, which the base has not seen.")
    if not isinstance(cache, ShadowCache) or torch.compiler.is_compiling():
        return
    assert cache.base is not None
    if cache.read_bare and (cache.shadow is None or not cache.shadow.layers):
        raise ValueError(
            "The bare base has gone on with these past_key_values while the adapter was disabled. Use a cache of its own "
            "for each."
        )
    if cache.shadow is None:
        return
    base, shadow = _length(cache.base), _length(cache.shadow)
    ahead = 0 if cache.drafted is None else cache.drafted.states.shape[1]
    if base is not None and shadow is not None and base + ahead != shadow:
        raise ValueError(
            f"In these past_key_values the base holds {base} tokens and the shadow {shadow - ahead}: one of them was used "
            "alone, with the adapter disabled or in the other inference mode. Use a cache of its own for each mode."
        )


def _length(cache: Cache) -> int | None:
    """Number of tokens held; None where a cache cannot tell without waiting for its device, or counts none."""
    if all(isinstance(layer, LinearAttentionLayer) for layer in cache.layers):
        return None
    length: Any = cache.get_seq_length()
    return None if isinstance(length, Tensor) and length.device.type != "cpu" else int(length)


def combine_caches(base: Any, shadow: Any, alone: bool = False) -> ShadowCache | StatePair | None:
    """What base and backbone returned as one object; None where one that ran returned nothing."""
    if base is None or (shadow is None and not alone):
        return None
    both = isinstance(base, Cache) and (shadow is None or isinstance(shadow, Cache))
    return ShadowCache(base, shadow) if both else StatePair(base, shadow)


def shadow_only_cache(shadow: Any) -> ShadowCache | StatePair | None:
    """The cache of a call in which the shadow runs alone."""
    if shadow is None:
        return None
    return ShadowCache(None, shadow) if isinstance(shadow, Cache) else StatePair(None, shadow)


def base_only(cache: Any) -> StatePair | None:
    """The base's cache alone, for a call without the adapter."""
    if cache is None:
        return None
    if isinstance(cache, ShadowCache):
        cache.read_bare = True
    return StatePair(cache.base if isinstance(cache, (ShadowCache, StatePair)) else cache, None)


def holds_tokens(cache: Any) -> bool:
    """Whether a cache is more than an empty one."""
    if cache is None:
        return False
    held = cache if isinstance(cache, ShadowCache) else getattr(cache, "base", cache)
    if not isinstance(held, Cache):
        return True
    recurrent = [layer for layer in held.layers if isinstance(layer, LinearAttentionLayer)]  # these count no tokens
    if recurrent:
        return any(any(layer.has_previous_state.values()) for layer in recurrent)
    return held.get_seq_length() > 0


def select_cache(cache: Any, runs_base: bool) -> Any:
    """The one cache that generation looks at: the base's, or the backbone's where the shadow runs alone."""
    if not isinstance(cache, (ShadowCache, StatePair)):
        return cache
    return cache.base if runs_base and cache.base is not None else cache.shadow


def num_uncached_tokens(input_ids: Tensor, model_kwargs: dict[str, Any]) -> int | None:
    """How many of the last tokens a cache does not hold, where a whole sequence `[B, T]` is continued from it; else None.

    Assisted generation reads all tokens it is given, whatever the cache holds. Mask and positions are as long as the
    sequence, so they tell a whole one from new tokens alone.
    """
    cache = model_kwargs.get("past_key_values")
    given = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
    lengths = [tensor.shape[-1] for tensor in given if tensor is not None]
    if not isinstance(cache, ShadowCache) or lengths[:1] != [input_ids.shape[1]]:
        return None
    held = cache.get_seq_length()
    return input_ids.shape[1] - held if held else None
