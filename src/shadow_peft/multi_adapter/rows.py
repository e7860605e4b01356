"""Which adapter answers each row of a batch, and tensors that are put together from parts of its rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def rows_by(keys: Sequence[Key]) -> dict[Key, list[int]]:
    """Key -> the rows that have it, in order; keys in the order of their first rows."""
    rows: dict[Key, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return rows


def select_rows(tensor: Tensor, rows: Sequence[int] | None, dim: int = 0) -> Tensor:
    """Rows of a tensor along a dimension; the tensor itself for None."""
    return tensor if rows is None else tensor.index_select(dim, torch.tensor(rows, device=tensor.device))


def merge_rows(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """One tensor from parts that hold its rows: `parts[i][1][j]` becomes row `parts[i][0][j]`; every row is in one part."""
    if len(parts) == 1 and list(parts[0][0]) == list(range(len(parts[0][0]))):
        return parts[0][1]
    places = [0] * sum(len(rows) for rows, _ in parts)
    for place, row in enumerate(row for rows, _ in parts for row in rows):
        places[row] = place
    merged = torch.cat([part for _, part in parts])
    return select_rows(merged, places)
