"""The loss of a classification or regression head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from shadow_peft.losses.reduction import IGNORE_INDEX, at_least_float32, token_count

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def problem_type_of(labels: Tensor, num_labels: int, declared: str | None) -> ProblemType:
    """The kind of classification problem, as transformers decides it: the config's word, else from the labels."""
    kinds: dict[str, ProblemType] = {
        "regression": "regression",
        "single_label_classification": "single_label_classification",
        "multi_label_classification": "multi_label_classification",
    }
    if declared is not None:
        if declared not in kinds:
            raise ValueError(f"config.problem_type must be one of {', '.join(kinds)}, got {declared!r}.")
        return kinds[declared]
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: ProblemType, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean loss of a classification or regression head.

    Args:
        logits: `[B, C]`; computed in float32 or wider.
        labels: `[B]` class indices, `-100` where there is none; `[B]` or `[B, C]` floats for regression; `[B, C]` multi
            label. The latter two know no missing label.
        problem_type: which loss: squared error, cross entropy, or binary cross entropy.
        num_items_in_batch: labels of the whole optimiser step; None counts those of this batch.

    Returns:
        A scalar.

    Raises:
        ValueError: a label of -100 that is no class index, or a `num_items_in_batch` that contradicts the labels.
    """
    if problem_type != "single_label_classification":
        _require_labels(labels, problem_type)
    logits, labels = at_least_float32(logits), labels.to(logits.device)
    if problem_type == "regression":
        total = F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype), reduction="sum")
    elif problem_type == "single_label_classification":
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return total / token_count(labels, num_items_in_batch)


def _require_labels(labels: Tensor, problem_type: ProblemType) -> None:
    """Refuse the mark of a missing class index among numbers; a compiled graph does not check that.

    Raises:
        ValueError: there is one.
    """
    if not torch.compiler.is_compiling() and labels.eq(IGNORE_INDEX).any():
        raise ValueError(
            f"A label is {IGNORE_INDEX}, which marks a missing class index, but the problem type is {problem_type!r}, which "
            "has no missing labels: trainers would leave it out of their count, and the loss would not. Drop such rows; "
            "where the number itself is meant, scale the labels."
        )
