"""What is trained: the shadow alone, as a language model behind the base's head; the base may be its teacher.

    loss = a * CE(q, next token) + b * KL(p || q)        p the base's, q the shadow's next-token distribution

KL reads the base's k most likely tokens, see `losses.frozen_head`. They are computed beside the shadow, or read from
a cache, see `teacher_cache`.

To align a small model with the base's head is to train its projection alone: p is then what the small model's own head says
of the same states of its backbone, which runs once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from shadow_peft.base.task_head import TaskHead
from shadow_peft.inputs import ModelInputs
from shadow_peft.losses.frozen_head import CHUNK, Factors, TopTokens, frozen_head_loss, top_tokens
from shadow_peft.losses.language_modeling import shifted
from shadow_peft.losses.reduction import token_count
from shadow_peft.model import ShadowPeftModel
from shadow_peft.pretraining.teacher_cache import TeacherCache


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

    Its state dict holds what is trained, and the frozen table of embeddings of a narrower shadow that has its own.

    Args:
        model: a base with its shadow, see `shadows`.
        objective: what the shadow learns. In evaluation the loss is the cross entropy, whatever it learns.
        cache: the base's most likely tokens of the blocks, already computed.
    """

    def __init__(self, model: ShadowPeftModel, objective: Objective, cache: TeacherCache | None = None) -> None:
        super().__init__()
        self.model, self.objective, self.cache = model, objective, cache
        self._head = TaskHead(model.base_model, model.decoder.head_input_path, width=model.decoder.hidden_size)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, index: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            input_ids: `[B, T]`.
            labels: `[B, T]`, `-100` where there is none; None takes the tokens themselves.
            index: numbers of the blocks in their stream `[B]`, by which they are found in the cache.

        Returns:
            `loss`, and its terms `[2]` per target without gradient, in nats.
        """
        targets = shifted(input_ids if labels is None else labels).flatten()
        distils = self.training and self.objective.distillation > 0
        states, teacher = self._states_and_teacher(input_ids, index, distils)
        factors = Factors(self.objective.next_token, self.objective.distillation) if self.training else Factors(1.0, 0.0)
        total, sums = frozen_head_loss(self._head, states.flatten(0, 1), targets, teacher, factors)
        count = token_count(targets, None)
        return {"loss": total / count, "terms": sums / count}

    def _states_and_teacher(self, input_ids: Tensor, index: Tensor | None, distils: bool) -> tuple[Tensor, TopTokens | None]:
        """The states `[B, T, d]` that the head reads, and the teacher of the flattened batch where there is one."""
        teacher = None
        if distils and self.cache is not None and index is not None:
            teacher = self.cache.read(index, input_ids)
        elif distils:
            teacher = self.teacher(input_ids)
        states = self.model.run(_inputs(input_ids), "shadow_only").shadow_state
        assert states is not None
        return states, teacher

    @torch.no_grad()
    def teacher(self, input_ids: Tensor) -> TopTokens:
        """The base's most likely next tokens, of the flattened batch `[B, T]`."""
        states = self.model.run(_inputs(input_ids), "base_only", skip_head=True).base[0].flatten(0, 1)
        return self._top_tokens(self._head, states)

    def _top_tokens(self, head: TaskHead, states: Tensor) -> TopTokens:
        parts = [top_tokens(head(chunk), self.objective.top_k) for chunk in states.split(CHUNK)]
        return TopTokens(torch.cat([p.ids for p in parts]), torch.cat([p.log_probs for p in parts]))

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; the base, which only teaches, has no dropout in either."""
        super().train(mode)
        self.model.base_model.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def kept(self) -> dict[str, nn.Parameter]:
        """The parameters that are stored: the trained ones, and all of a backbone that was made here."""
        made_here = "model.shadow_model." if self.model.has_implicit_shadow else None
        return {
            name: p
            for name, p in self.named_parameters()
            if p.requires_grad or (made_here is not None and name.startswith(made_here))
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The parameters that are stored."""
        return {name: p.detach() for name, p in self.kept().items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Copy the parameters that are stored.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs: they are those of another shadow.
        """
        own = self.kept()
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        if shapes != {name: tuple(p.shape) for name, p in state_dict.items()}:
            raise ValueError(
                "The checkpoint holds another shadow than this one: resume with the options that it was made by."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


class AlignedStudent(Student):
    """A small model's projection, which learns to say through the base's head what the small model's own head says.

    Args:
        model: a base with the small model as its shadow; everything but the projection is frozen.
        objective: what the projection learns.
        own_head: the small model's own head, from its states `[N, S]`.

    Raises:
        ValueError: the shadow has no projection.
    """

    def __init__(self, model: ShadowPeftModel, objective: Objective, own_head: TaskHead) -> None:
        super().__init__(model, objective)
        if not isinstance(model.shadow_hidden_projection, nn.Linear):
            raise ValueError("There is no projection to align: the small model has the base's width and the base's head.")
        model.shadow_model.requires_grad_(False)
        self._own_head = own_head

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move the small model's own head along, which is no part of this module."""
        self._own_head.apply_to_modules(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def _states_and_teacher(self, input_ids: Tensor, index: Tensor | None, distils: bool) -> tuple[Tensor, TopTokens | None]:
        with torch.no_grad():
            own, _ = self.model.backbone_states(_inputs(input_ids))
            teacher = self._top_tokens(self._own_head, own.flatten(0, 1)) if distils else None
        return self.model.project(own), teacher

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; the backbone, which is frozen, has no dropout in either."""
        super().train(mode)
        self.model.shadow_model.eval()
        return self


def _inputs(input_ids: Tensor) -> ModelInputs:
    return ModelInputs(input_ids=input_ids, use_cache=False)
