"""Log-probabilities of an adapted model, in the form that TRL's trainers ask for.

TRL calls `model(..., labels=labels, fused_lm_head=True)`, for which it binds a `forward` of its own to a model. That
`forward` runs the base's decoder and head directly: it applies no adapter and knows no shadow. `Scored` replaces the model
during one call of a trainer's loss. It answers such calls with the same fields, computed from the model's own logits, and
keeps the shadow's log-probabilities for the shadow's loss.

Logits are computed only at positions that predict a target in some row, and the softmax only at the targets.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from shadow_peft.losses.reduction import IGNORE_INDEX, at_least_float32
from shadow_peft.tasks.causal_lm import ShadowForCausalLM


class Scored:
    """Replaces a causal LM while one loss is computed.

    Args:
        model: a `ShadowForCausalLM`, possibly wrapped.
        temperature: divides the logits of both paths.
        shadow: compute the shadow's logits too.

    Attributes:
        mask: `[B, T - 1]`, positions whose next token is a target, N in all.
        targets: `[N]`.
        log_probs: `[N, V]` of the adapted base.
        shadow_log_probs: `[N, V]` of the shadow; None unless `shadow` is set.
    """

    mask: Tensor
    targets: Tensor
    log_probs: Tensor
    shadow_log_probs: Tensor | None = None

    def __init__(self, model: Any, temperature: float = 1.0, *, shadow: bool = False) -> None:
        self._model = model
        self._temperature = temperature
        self._shadow = shadow

    def __call__(self, *, labels: Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Per-token scores of `labels` `[B, T]`; without `fused_lm_head`, the output of the model itself."""
        if not fused_lm_head:
            return self._model(labels=labels, **inputs)
        assert labels is not None
        targets = labels[:, 1:]
        self.mask = targets.ne(IGNORE_INDEX)
        kept = self.mask.any(0).nonzero().squeeze(1)
        outputs = self._model(**inputs, logits_to_keep=kept, output_shadow_logits=self._shadow)
        self.targets = targets[self.mask]
        self.log_probs = self._normal(outputs.logits, kept)
        if self._shadow:
            self.shadow_log_probs = self._normal(outputs.shadow_logits, kept)
        return self._output(outputs.logits[self.mask[:, kept]] / self._temperature)

    def _normal(self, logits: Tensor, kept: Tensor) -> Tensor:
        return (at_least_float32(logits[self.mask[:, kept]]) / self._temperature).log_softmax(-1)

    def _output(self, logits: Tensor) -> FusedCausalLMOutput:
        chosen = self.log_probs.gather(-1, self.targets[:, None]).squeeze(-1)
        entropy = -(self.log_probs.exp() * self.log_probs).sum(-1)
        return FusedCausalLMOutput(
            loss=-chosen.sum() / self.mask.sum().clamp(min=1),
            log_probs=self.spread(chosen),
            entropy=self.spread(entropy),
            log_sum_sq_probs=self.spread((2 * self.log_probs.detach()).logsumexp(-1)),
            mean_logits=self.spread(at_least_float32(logits.detach()).mean(-1)),
            is_top1=self.spread(self.log_probs.argmax(-1).eq(self.targets)),
            label_mask=self.mask,
        )

    def spread(self, values: Tensor) -> Tensor:
        """Values `[N]` of the targets at their positions `[B, T - 1]`, zero elsewhere."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


class Reference(nn.Module):
    """The frozen reference of a policy: its own base with the adapter disabled, instead of a second copy of the base.

    It is a module because TRL prepares it as one, but it has no parameters of its own. TRL and accelerate bind a `forward`
    to it that is never called: `__call__` calls the policy.

    Args:
        policy: the model that is trained.
        temperature: see `Scored`.
    """

    def __init__(self, policy: ShadowForCausalLM, temperature: float = 1.0) -> None:
        super().__init__()
        self.__dict__["_policy"] = policy  # no submodule: it must not be prepared, moved or saved twice
        self.config = policy.config
        self._temperature = temperature

    def __call__(self, **inputs: Any) -> Any:
        """Scores of the bare base, see `Scored`."""
        policy = self.__dict__["_policy"]
        with policy.peft_model.disable_adapter():
            return Scored(policy, self._temperature)(**inputs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's state dict; TRL uses it as the key of a cache of reference log-probabilities."""
        return self.__dict__["_policy"].peft_model.base_model.state_dict(*args, **kwargs)
