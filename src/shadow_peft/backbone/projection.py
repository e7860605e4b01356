"""P: from the backbone's width S to the base's width d, and what is fitted by least squares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.base.architectures import read_size

PROJECTION = "shadow_hidden_projection"

CHUNK = 2048
"""Rows of a table of embeddings that exist in float64 at once."""


def make_projection(backbone: PreTrainedModel, hidden_size: int) -> nn.Module:
    """P: the projection that the backbone carries, a new one for another width, or the identity.

    Raises:
        ValueError: the carried projection does not map the backbone's width to the base's.
    """
    width = backbone_width(backbone)
    carried = carried_projection(backbone)
    if carried is not None:
        if (carried.in_features, carried.out_features) != (width, hidden_size):
            raise ValueError(
                f"The shadow's projection maps {carried.in_features} to {carried.out_features}, but the shadow is "
                f"{width} wide and the base {hidden_size}."
            )
        return carried
    return nn.Identity() if width == hidden_size else nn.Linear(width, hidden_size, bias=False)


def carried_projection(model: PreTrainedModel) -> nn.Linear | None:
    """The projection that an explicit shadow brings along, or None."""
    projection = getattr(model, PROJECTION, None)
    return projection if isinstance(projection, nn.Linear) else None


def carry_projection(model: PreTrainedModel, projection: nn.Linear) -> None:
    """Let a model bring a projection along, beside its modules, so that no state dict shows it."""
    object.__setattr__(model, PROJECTION, projection)


def backbone_width(backbone: PreTrainedModel) -> int:
    """Width S of the hidden states that a backbone returns."""
    return read_size(backbone.config.get_text_config(decoder=True), "hidden_size")


def fit_embedding_map(source: Tensor, target: Tensor) -> Tensor:
    """M `[d, S]` that minimises |source @ M - target| for two embedding tables `[V, d]` and `[V, S]` of one vocabulary."""
    return _least_squares(source, target, None).to(target.dtype)


def fit_projection(large_head: Tensor, small_head: Tensor, tokens: int | None = None) -> Tensor:
    """P `[d, S]` in float64 that minimises |W_large @ P - W_small| for two heads `[V, d]` and `[V', S]`.

    Args:
        large_head: W_large.
        small_head: W_small.
        tokens: number of tokens of the tokenizer; rows behind them are padding. None takes all rows that both have.
    """
    return _least_squares(large_head, small_head, tokens)


class Reconstruction(NamedTuple):
    """How well W_large @ P reproduces W_small, over the rows that P was fitted to.

    Attributes:
        relative_error: |W_large @ P - W_small| / |W_small|, Euclidean norms.
        explained_variance: 1 - |W_large @ P - W_small|^2 / |W_small - its mean row|^2.
    """

    relative_error: float
    explained_variance: float


@torch.no_grad()
def reconstruction(large_head: Tensor, small_head: Tensor, projection: Tensor, tokens: int | None = None) -> Reconstruction:
    """Measure a projection P `[d, S]` by the rows themselves; the arguments are those of `fit_projection`."""
    weight, device = projection.double(), large_head.device
    residual, squares = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
    count, total = 0, torch.zeros(small_head.shape[1], dtype=torch.float64, device=device)
    for a, b in _row_chunks(large_head, small_head, tokens):
        residual += (a @ weight.to(device) - b).square().sum()
        squares += b.square().sum()
        total += b.sum(0)
        count += len(b)
    variance = squares - total.square().sum() / count
    return Reconstruction(float((residual / squares).sqrt()), float(1 - residual / variance))


def _least_squares(a: Tensor, b: Tensor, rows: int | None) -> Tensor:
    """X in float64 that minimises |a @ X - b| over the rows that both have, that of least norm where there are many.

    X = (a^T a)^+ a^T b: only the products `[d, d]` and `[d, S]` exist whole, a and b are read in chunks of rows.
    """
    gram = torch.zeros(a.shape[1], a.shape[1], dtype=torch.float64, device=a.device)
    cross = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for chunk, values in _row_chunks(a, b, rows):
        gram.addmm_(chunk.T, chunk)
        cross.addmm_(chunk.T, values)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    least = eigenvalues[-1] * len(gram) * torch.finfo(torch.float64).eps
    inverse = torch.where(eigenvalues > least, 1 / eigenvalues, 0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))


def _row_chunks(a: Tensor, b: Tensor, rows: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that both have, in chunks of float64 on a's device; at most the first `rows`."""
    shared = min(a.shape[0], b.shape[0], a.shape[0] if rows is None else rows)
    for start in range(0, shared, CHUNK):
        part = slice(start, min(start + CHUNK, shared))
        yield a[part].detach().double(), b[part].detach().to(a.device).double()
