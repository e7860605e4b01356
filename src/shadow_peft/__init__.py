"""ShadowPEFT: a frozen base model and a small trainable shadow that corrects it, and stands alone when detached.

The path of one batch, a file for each step:

    tokens -> backbone (twin, narrowing) -> s               initial shadow state
    tokens -> base layers, ridden by attach -> logits       passage: injection before a layer, update after it
    logits, shadow_logits -> loss                           causal_lm, sequence_classification
"""

from shadow_peft.backbone.explicit import prepare_shadow_model
from shadow_peft.backbone.projected_lm import (
    AutoModelForCausalLMWithHiddenProjection,
    AutoModelForCausalLMWithHiddenProjectionConfig,
)
from shadow_peft.cache import ShadowCache
from shadow_peft.config import ShadowConfig
from shadow_peft.model import ShadowPeftModel, get_shadow_model
from shadow_peft.tasks.causal_lm import ShadowCausalLMOutputWithPast, ShadowForCausalLM
from shadow_peft.tasks.sequence_classification import ShadowForSequenceClassification, ShadowSequenceClassifierOutput

__all__ = [
    "AutoModelForCausalLMWithHiddenProjection",
    "AutoModelForCausalLMWithHiddenProjectionConfig",
    "ShadowCache",
    "ShadowCausalLMOutputWithPast",
    "ShadowConfig",
    "ShadowForCausalLM",
    "ShadowForSequenceClassification",
    "ShadowPeftModel",
    "ShadowSequenceClassifierOutput",
    "get_shadow_model",
    "prepare_shadow_model",
]
