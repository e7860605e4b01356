"""The adapters of one call whose rows belong to different ones.

    x [B, T] -> backbone of each adapter, on its rows -> s [B, T, d] -> one pass of the base, coupled by groups of rows

It stands where a single adapter stands in a call: it has an initial state and a coupling. Rows of the bare base have no
backbone; their state is zero, and nothing reads it. The same holds for rows of adapters that do not use the shadow's state,
in calls that read no state themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base.decoder import Decoder
from shadow_peft.cache import ShadowCache, StatePair, make_shadow_cache
from shadow_peft.inputs import ModelInputs, with_drafted
from shadow_peft.multi_adapter.coupling import (
    GroupedEvolvingCoupling,
    GroupedStaticCoupling,
    MixedCoupling,
    RowGroup,
    dropout_of,
)
from shadow_peft.multi_adapter.row_caches import RowCaches
from shadow_peft.multi_adapter.rows import merge_rows, rows_by, select_rows
from shadow_peft.multi_adapter.weights import (
    Formulas,
    StackedWeights,
    formulas_of,
    pieces_of,
    stack_weights,
    versions_of,
)

BASE = "__base__"
"""In `adapter_names`: the bare base answers this row."""


class MixedAdapters:
    """The adapters of one call.

    Args:
        names: the adapter of each row, or BASE.
        adapters: name -> adapter, for all but BASE.
        decoder: the base's decoder.
        dtype: dtype of the computation.
        reads_state: whether the call reads the states of all rows; False leaves out backbones that adapters do not use.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        adapters: Mapping[str, ShadowAdapter],
        decoder: Decoder,
        dtype: torch.dtype,
        reads_state: bool = True,
    ) -> None:
        self.names = names
        self._adapters = adapters
        self._decoder, self._dtype = decoder, dtype
        self._rows = {name: rows for name, rows in rows_by(names).items() if name != BASE}
        self._running = [name for name in self._rows if reads_state or adapters[name].shadow_config.use_shadow_state]
        self._caches: RowCaches | None = None

    def shadow_cache(self, cache: Cache) -> RowCaches:
        """Empty caches for the backbones that run, beside a cache of the base."""
        parts = {name: make_shadow_cache(cache, self._adapters[name].shadow_model.config) for name in self._running}
        return RowCaches(self.names, parts)

    def lack(self, cache: Any) -> bool:
        """Whether a backbone that runs has no part in a cache, which an earlier call began without it."""
        return isinstance(cache, RowCaches) and not cache.parts.keys() >= set(self._running)

    def initial_state(self, inputs: ModelInputs) -> tuple[Tensor, Any]:
        """s `[B, T, d]` of all rows, and the backbones' caches; states that drafting computed are reused."""
        if isinstance(inputs.cache, ShadowCache) and isinstance(inputs.cache.shadow, RowCaches):
            self._caches = inputs.cache.shadow
            self._running = list(self._caches.parts)  # one that holds tokens is kept in step
        return with_drafted(inputs, self._run_backbones)

    def _run_backbones(self, inputs: ModelInputs) -> tuple[Tensor, Any]:
        states: list[tuple[Sequence[int], Tensor]] = []
        returned: dict[str, Any] = {}
        for name, rows in self._rows.items():
            if name not in self._running:
                continue
            part = inputs if len(rows) == len(self.names) else inputs.select_rows(rows)
            cache = None if self._caches is None else StatePair(None, self._caches.parts[name])
            state, returned[name] = self._adapters[name].run_backbone(replace(part, cache=cache))
            states.append((rows, state))
        others = [row for row, name in enumerate(self.names) if name not in self._running]
        if others:
            width = self._decoder.hidden_size
            like = states[0][1] if states else next(iter(inputs.tokens.values()))
            zeros = torch.zeros(len(others), inputs.length, width, dtype=self._dtype, device=like.device)
            states.append((others, zeros))
        return merge_rows(states), self._returned(returned)

    def _returned(self, caches: dict[str, Any]) -> RowCaches | None:
        """What the backbones returned as one cache, or None.

        Raises:
            ValueError: a backbone keeps something else than a transformers cache.
        """
        if self._caches is not None:
            return self._caches
        if any(cache is None for cache in caches.values()):
            return None
        if not all(isinstance(cache, Cache) for cache in caches.values()):
            raise ValueError(
                "adapter_names with a cache needs backbones with a transformers cache; this architecture keeps another "
                "state. Pass use_cache=False, or decode the rows of each adapter by themselves."
            )
        return RowCaches(self.names, caches)

    # ---------------------------------------------------------------- coupling

    def make_coupling(self, state: Tensor, keep_head_input: bool = False) -> MixedCoupling:
        """The coupling of one forward pass of the base, from an initial state s `[B, T, d]`."""
        formulas = {name: formulas_of(self._adapters[name].shadow_config) for name in self._rows}
        groups = [
            self._group([name for name in self._rows if formulas[name] == same], state)
            for same in dict.fromkeys(formulas.values())
        ]
        return MixedCoupling(groups, self._decoder.residual_stream, keep_head_input)

    def _group(self, names: Sequence[str], state: Tensor) -> RowGroup:
        """The rows of adapters with the same formulas, sorted by adapter, and their coupling."""
        rows = [row for name in names for row in self._rows[name]]
        everything = rows == list(range(len(self.names)))
        index = None if everything else torch.tensor(rows, device=state.device)
        state = select_rows(state, None if everything else rows)
        adapters = [self._adapters[name] for name in names]
        if len(adapters) == 1:
            return RowGroup(index, adapters[0].make_coupling(state))
        pieces = pieces_of([len(self._rows[name]) for name in names])
        config = adapters[0].shadow_config
        state = state if config.use_shadow_state else torch.zeros_like(state)
        kind = GroupedStaticCoupling if config.variant == "readout" else GroupedEvolvingCoupling
        dropouts = [adapter.shadow_config.dropout if adapter.training else 0.0 for adapter in adapters]
        coupling = kind(
            state,
            self._weights(formulas_of(config), adapters, pieces),
            config.first_injected_layer,
            self._decoder.residual_stream,
            dropout_of(dropouts, pieces, state.device),
            config.normalize_injection,
        )
        return RowGroup(index, coupling)

    def _weights(self, formulas: Formulas, adapters: Sequence[ShadowAdapter], pieces: Sequence[int]) -> StackedWeights:
        """The stacked weights; the steps of a generation share them in its cache while no parameter changes."""
        if self._caches is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return stack_weights(adapters, pieces, self._dtype)
        stacked = self._caches.stacked.get(formulas)
        if stacked is None or stacked.versions != versions_of(adapters):
            stacked = self._caches.stacked[formulas] = stack_weights(adapters, pieces, self._dtype)
        return stacked
