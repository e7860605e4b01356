"""The loss of a classification or regression head."""

from __future__ import annotations

from typing import Literal

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
            label.
        problem_type: which loss: squared error, cross entropy, or binary cross entropy.
        num_items_in_batch: labels of the whole optimiser step; None counts those of this batch.

    Returns:
        A scalar.
    """
    logits, labels = at_least_float32(logits), labels.to(logits.device)
    if problem_type == "regression":
        total = F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype), reduction="sum")
    elif problem_type == "single_label_classification":
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return total / token_count(labels, num_items_in_batch)
