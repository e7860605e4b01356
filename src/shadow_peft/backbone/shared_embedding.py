"""An embedding table of the base that an implicit backbone reads.

Some backbones must be given token ids: their layers look tokens up beside the embeddings. Such a backbone reads the base's
own tables. They are no modules of it, so it neither trains nor saves nor moves them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class SharedEmbedding(nn.Module):
    """`table(ids)`, or some columns of it.

    Args:
        table: the base's embedding table `[V, n]`.
        columns: the columns `[m]` that are read; None reads all.
    """

    table: nn.Embedding
    columns: Tensor | None

    def __init__(self, table: nn.Embedding, columns: Tensor | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "table", table)  # beside the modules, so that no state dict shows it
        self.register_buffer("columns", columns, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The entries that are read, `[V, m]`."""
        return self._select(self.table.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[B, T, m]`; leaves in training: reentrant checkpoints drop gradients of inputs that need none."""
        embeds = self._select(self.table(input_ids))
        return embeds.detach().requires_grad_() if self.training and torch.is_grad_enabled() else embeds

    def materialize(self) -> nn.Embedding:
        """A table of its own with a copy of the columns that are read."""
        own = copy.deepcopy(self.table)
        own.weight = nn.Parameter(self.weight.detach().clone())
        return own

    def _select(self, entries: Tensor) -> Tensor:
        return entries if self.columns is None else entries[..., self.columns.to(entries.device)]
