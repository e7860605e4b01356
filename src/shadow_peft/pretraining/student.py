"""What is trained: the shadow alone, as a language model behind the base's head; the base may be its teacher.

    loss = a * CE(q, next token) + b * KL(p || q)        p the base's, q the shadow's next-token distribution

KL reads the base's k most likely tokens, see `losses.sparse_distillation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shadow_peft.base.task_head import TaskHead
from shadow_peft.inputs import ModelInputs
from shadow_peft.losses.language_modeling import shifted
from shadow_peft.losses.reduction import token_count
from shadow_peft.losses.sparse_distillation import CHUNK, Factors, TopTokens, student_loss, top_tokens
from shadow_peft.model import ShadowPeftModel


@dataclass(frozen=True)
class Objective:
    """What the shadow learns.

    Attributes:
        next_token: a, weight of the cross entropy with the text.
        distillation: b, weight of the divergence from the base's distribution.
        top_k: the base's most likely tokens that are compared.

    Raises:
        ValueError: a number is out of range.
    """

    next_token: float = 1.0
    distillation: float = 0.0
    top_k: int = 32

    def __post_init__(self) -> None:
        if min(self.next_token, self.distillation) < 0 or self.next_token + self.distillation == 0:
            raise ValueError(
                f"The weights of the next-token loss and of the distillation must not be negative, nor both 0; "
                f"got {self.next_token} and {self.distillation}."
            )
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")


class Student(nn.Module):
    """The shadow of a base as a language model of its own.

    Its state dict holds what is trained and nothing else.

    Args:
        model: a base with its shadow, see `cut`.
        objective: what the shadow learns. In evaluation the loss is the cross entropy, whatever it learns.
    """

    def __init__(self, model: ShadowPeftModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self._head = TaskHead(model.base_model, model.decoder.head_input_path, width=model.decoder.hidden_size)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            input_ids: `[B, T]`.
            labels: `[B, T]`, `-100` where there is none; None takes the tokens themselves.

        Returns:
            `loss`, and its terms `[2]` per target without gradient, in nats.
        """
        inputs = ModelInputs(input_ids=input_ids, use_cache=False)
        targets = shifted(input_ids if labels is None else labels).flatten()
        learns = self.training and self.objective.distillation > 0
        teacher = self.teacher(inputs) if learns else None
        states = self.model.run(inputs, "shadow_only").shadow_state
        assert states is not None
        factors = Factors(self.objective.next_token, self.objective.distillation) if self.training else Factors(1.0, 0.0)
        total, sums = student_loss(self._head, states.flatten(0, 1), targets, teacher, factors)
        count = token_count(targets, None)
        return {"loss": total / count, "terms": sums / count}

    @torch.no_grad()
    def teacher(self, inputs: ModelInputs) -> TopTokens:
        """The base's most likely next tokens, of the flattened batch."""
        states = self.model.run(inputs, "base_only", skip_head=True).base[0].flatten(0, 1)
        parts = [top_tokens(self._head(chunk), self.objective.top_k) for chunk in states.split(CHUNK)]
        return TopTokens(torch.cat([p.ids for p in parts]), torch.cat([p.log_probs for p in parts]))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters."""
        return {name: p.detach() for name, p in self.trained().items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Copy the trained parameters.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs: they are those of another shadow.
        """
        own = self.trained()
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        if shapes != {name: tuple(p.shape) for name, p in state_dict.items()}:
            raise ValueError(
                "The checkpoint holds another shadow than this one: resume with the options that it was made by."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])
