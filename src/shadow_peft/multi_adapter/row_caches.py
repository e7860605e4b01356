"""The backbones' caches of a batch whose rows belong to different adapters, as one cache.

Each adapter has a cache of its own that holds its rows alone. Whatever acts on rows (reorder, repeat, select) is translated
from rows of the batch to rows of each cache; whatever acts on tokens acts on all caches alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from shadow_peft.multi_adapter.rows import rows_by
from shadow_peft.multi_adapter.weights import Formulas, StackedWeights


class RowCaches(Cache):
    """The caches of several backbones.

    Args:
        names: the adapter of each row; names that are not in `parts` have no backbone that runs.
        parts: adapter -> its cache.

    Attributes:
        stacked: weights that the steps of a generation share, see `multi_adapter.mixed`.
    """

    def __init__(self, names: tuple[str, ...], parts: dict[str, Cache]) -> None:
        self.names = names
        self.parts = parts
        self.stacked: dict[Formulas, StackedWeights] = {}

    @property
    def layers(self) -> list[Any]:
        """The layers of all caches."""
        return [layer for part in self.parts.values() for layer in part.layers]

    @property
    def offloading(self) -> bool:
        """Whether a cache is offloaded."""
        return any(part.offloading for part in self.parts.values())

    @property
    def rows(self) -> dict[str, list[int]]:
        """Adapter -> its rows, for those that have a cache."""
        return {name: rows for name, rows in rows_by(self.names).items() if name in self.parts}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens held; 0 where no adapter has a cache."""
        first = next(iter(self.parts.values()), None)
        return 0 if first is None else first.get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was, `[B]`; both belong to one adapter.

        Raises:
            ValueError: a row would get the states of another adapter.
        """
        source = beam_idx.tolist()
        for row, name in enumerate(self.names):
            if self.names[source[row]] != name:
                raise ValueError(
                    f"Row {source[row]} belongs to {self.names[source[row]]!r}; a row of {name!r} cannot continue it."
                )
        for name, rows in self.rows.items():
            self.parts[name].reorder_cache(self._local(name, [source[row] for row in rows], beam_idx.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for part in self.parts.values():
            part.batch_repeat_interleave(repeats)
        self._rename(tuple(name for name in self.names for _ in range(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in their order; adapters without a row are gone."""
        names = tuple(self.names[row] for row in indices.tolist())
        chosen = rows_by(names)
        for name in list(self.parts):
            if name not in chosen:
                del self.parts[name]
                continue
            kept = [int(indices[place]) for place in chosen[name]]
            self.parts[name].batch_select_indices(self._local(name, kept, indices.device))
        self._rename(names)

    def _local(self, name: str, rows: list[int], device: torch.device) -> Tensor:
        """Rows of the batch as rows of an adapter's cache."""
        places = {row: place for place, row in enumerate(self.rows[name])}
        return torch.tensor([places[row] for row in rows], device=device)

    def _rename(self, names: tuple[str, ...]) -> None:
        self.names, self.stacked = names, {}

    def __repr__(self) -> str:
        return f"RowCaches({', '.join(f'{name}={part!r}' for name, part in self.parts.items())})"
