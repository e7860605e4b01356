"""Rows of tokens as tensors, for completions and for classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import training


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as tensors `[B, T]`, padded on the right; labels `[B]` where they are classes."""
    if isinstance(rows[0]["labels"], list):
        return training.collate(rows)
    batch = training.collate([{"input_ids": row["input_ids"], "labels": []} for row in rows])
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
