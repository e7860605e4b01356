"""One optimizer step of a trainer, and the same step written by hand.

A reference runs every sequence alone and unpadded, and sums in plain torch; so it knows neither batches nor accumulation,
padding or packing. `compare` prints the largest relative error, `pytest -s` shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from shadow_peft import ShadowForCausalLM
from tests.tiny_models import adapted, llama

WEIGHT = 0.5
VOCABULARY = 300
Gradients = dict[str, torch.Tensor]

#: TRL 1.16 asks transformers 5.23 by a name that became deprecated.
TRL_NAMES = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ACCUMULATION = pytest.mark.parametrize("accumulation", [1, 4])


def base(**sizes: Any) -> PreTrainedModel:
    return llama(vocab_size=VOCABULARY, eos_token_id=1, bos_token_id=None, **sizes)


def whole_model(weight: float = WEIGHT, **config: Any) -> ShadowForCausalLM:
    """A causal LM with every part that an adapter can have: projection and trained heads too."""
    shadow = llama(3, hidden_size=16, num_hidden_layers=2, vocab_size=VOCABULARY)
    settings = {"modules_to_save": ["lm_head", "shadow_lm_head"], **config}
    return ShadowForCausalLM(adapted(base(), shadow_model=shadow, **settings), shadow_loss_weight=weight)


def small_model(weight: float = WEIGHT, **config: Any) -> ShadowForCausalLM:
    """A causal LM with an implicit shadow and no head of its own."""
    return ShadowForCausalLM(adapted(base(), **config), shadow_loss_weight=weight)


def options(folder: Path, accumulation: int = 1, rows: int = 8, **more: Any) -> dict[str, Any]:
    """Arguments of a step over all rows that leaves the model as it is."""
    return {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 1,
        "per_device_train_batch_size": rows // accumulation, "gradient_accumulation_steps": accumulation, "optim": "sgd",
        "learning_rate": 0.0, "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
        "activation_checkpointing": False, "dataloader_pin_memory": False,
    } | more  # fmt: skip


class Capture(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = gradients(model)


def gradients(model: torch.nn.Module) -> Gradients:
    """Gradients of each adapter part as one vector."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found.setdefault(_part(name), []).append(gradient.detach().flatten().clone())
    return {part: torch.cat(pieces) for part, pieces in found.items()}


def _part(name: str) -> str:
    owner, *rest = name.split("peft_model.", 1)[-1].split(".")
    if owner in ("shadow_model", "shadow_hidden_projection"):
        return owner
    return ".".join([owner, rest[0]]) if owner == "task_heads" else ".".join(rest)


def error(actual: Gradients, expected: Gradients) -> float:
    """The largest relative error of a part; 1 for a part that only one of the two trains."""
    assert actual.keys() == expected.keys()
    pairs = [(actual[part], expected[part]) for part in expected]
    return max(float((a - e).norm() / torch.maximum(a.norm(), e.norm())) for a, e in pairs if a.any() or e.any())


def compare(title: str, actual: Gradients, model: torch.nn.Module, loss: Callable[[float], torch.Tensor]) -> None:
    """Assert that a step's gradients are those of `loss(weight)`, and that they show when the shadow's loss is dropped."""
    expected, dropped = (by_hand(model, loss(weight)) for weight in (WEIGHT, 0.0))
    assert all(part.any() for part in expected.values()), "every part is trained in these tests"
    print(f"| {title} | {error(actual, expected):.1e} | {error(actual, dropped):.2f} |")
    assert error(actual, expected) < 1e-5
    assert error(actual, dropped) > 1e-2


def by_hand(model: torch.nn.Module, loss: torch.Tensor) -> Gradients:
    """The gradients of a loss."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return gradients(model)


def logits_of(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[T, V]` of both paths for one sequence alone."""
    output = model(input_ids=torch.tensor([ids]), output_shadow_logits=True)
    return output.logits[0], output.shadow_logits[0]


def scores(logits: torch.Tensor, ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities of the tokens from `start` on, given those before them."""
    return F.log_softmax(logits, -1)[range(start - 1, len(ids) - 1), ids[start:]]
