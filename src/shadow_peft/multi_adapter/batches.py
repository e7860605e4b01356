"""Batches of a `ShadowPeftModel` whose rows belong to different adapters: the names of the rows, and their caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.cache import ShadowCache, make_shadow_cache, with_shadow_cache, without_shadow
from shadow_peft.inputs import ModelInputs
from shadow_peft.multi_adapter.files import AdapterFilesMixin
from shadow_peft.multi_adapter.mixed import BASE, MixedAdapters
from shadow_peft.multi_adapter.row_caches import RowCaches
from shadow_peft.multi_adapter.rows import rows_by, select_rows


class MixedBatchesMixin(AdapterFilesMixin):
    """Mixed batches of a `ShadowPeftModel`."""

    def row_names(self, adapter_names: Sequence[str] | None, cache: Any, num_rows: int) -> tuple[str, ...] | None:
        """The adapter of each row of a call: as given, or else as in a cache that is continued; None for the active one.

        Raises:
            ValueError: not one name a row, an unknown name, a cache of other adapters, or the adapters are disabled.
        """
        before = self.held_names(cache)
        if adapter_names is None:
            return before
        if isinstance(adapter_names, str) or len(adapter_names) != num_rows:
            raise ValueError(f"adapter_names must hold one name a row, {num_rows} names, got {adapter_names!r}.")
        if not self.attachment.enabled:
            raise ValueError("adapter_names was given inside disable_adapter(); name '__base__' for rows of the bare base.")
        names = tuple(adapter_names)
        for name in dict.fromkeys(names):
            if name != BASE:
                self.adapter(name)
        has_shadow = isinstance(cache, ShadowCache) and cache.shadow is not None
        if has_shadow and before != names:
            owners = "the active adapter" if before is None else list(before)
            raise ValueError(f"These past_key_values belong to {owners}, and adapter_names is {list(names)}.")
        return names

    def held_names(self, cache: Any) -> tuple[str, ...] | None:
        """The adapter of each row of a cache; None of one that belongs to one adapter, or of no cache."""
        held = cache.shadow if isinstance(cache, ShadowCache) else None
        return held.names if isinstance(held, RowCaches) else None

    def mixed(self, names: tuple[str, ...], shadow_only: bool = False, reads_state: bool = True) -> MixedAdapters:
        """The adapters of a call with one name a row; `reads_state` as in `ShadowPeftModel.run`.

        Raises:
            ValueError: a row of the bare base where the shadows run alone.
        """
        if shadow_only and BASE in names:
            raise ValueError("A row of '__base__' has no shadow, so nothing answers it in the mode \"shadow_only\".")
        adapters = {name: self.adapter(name) for name in dict.fromkeys(names) if name != BASE}
        return MixedAdapters(names, adapters, self.decoder, self.base_model.dtype, reads_state)

    @property
    def vocab_size(self) -> int:
        """V, as the base's config tells it; 0 where it does not."""
        return int(getattr(self.base_model.config.get_text_config(), "vocab_size", 0))

    def count_label_tokens(self, targets: Tensor, names: tuple[str, ...] | None) -> None:
        """Count targets `[B, T]` for the adapters of their rows; a compiled graph counts none."""
        if torch.compiler.is_compiling():
            return
        if names is None:
            self.label_tokens.count(targets, self.vocab_size)
        else:
            for name, rows in rows_by(names).items():
                if name != BASE:
                    self.adapter(name).label_tokens.count(select_rows(targets, rows), self.vocab_size)

    def drafting_adapters(self, cache: ShadowCache, num_rows: int) -> dict[str, tuple[ShadowAdapter, int]]:
        """Name -> adapter and number of its rows, for the rows of a cache that have a shadow."""
        if isinstance(cache.shadow, RowCaches):
            return {name: (self.adapter(name), len(rows)) for name, rows in cache.shadow.rows.items()}
        return {self.active_adapter: (self, num_rows)}

    def skips_shadow(self, cache: Any) -> bool:
        """Whether a call that does not read the active shadow leaves it out: its adapter does not use it, nor the cache."""
        return not self.shadow_config.use_shadow_state and getattr(cache, "shadow", None) is None

    def no_state(self, inputs: ModelInputs) -> Tensor:
        """Zeros in the place of s, `[B, T, d]`, for a call that leaves the shadow out."""
        shape = (inputs.num_rows, inputs.length, self.base_hidden_size)
        return torch.zeros(shape, dtype=self.base_model.dtype, device=next(iter(inputs.tokens.values())).device)

    def with_shadow_cache(self, cache: Any, names: tuple[str, ...] | None = None, reads_state: bool = True) -> Any:
        """The cache of both networks for a cache that a caller passes, see `cache.with_shadow_cache` and `run`.

        Raises:
            ValueError: it was filled by another adapter than the active one, which is to continue it.
        """
        if names is not None:
            adapters = self.mixed(names, reads_state=reads_state)
            if isinstance(cache, ShadowCache) and adapters.lack(cache.shadow):
                cache = without_shadow(cache)
            return with_shadow_cache(cache, adapters.shadow_cache)
        alone = not reads_state and self.skips_shadow(cache)
        cache = with_shadow_cache(cache, lambda given: make_shadow_cache(given, self.shadow_model.config), alone)
        if isinstance(cache, ShadowCache):
            if cache.adapter_name not in (None, self.active_adapter):
                raise ValueError(
                    f"These past_key_values belong to adapter {cache.adapter_name!r}, but {self.active_adapter!r} is "
                    "active. Use a cache of its own for each."
                )
            cache.adapter_name = self.active_adapter
        return cache
