"""ShadowPEFT: a frozen base model and a small trainable shadow that corrects it, and stands alone when detached.

The path of one batch, and where each step is:

    tokens -> backbone -> P -> s            initial shadow state                           adapter, backbone/
    tokens -> base -> h                     hooks on the base's layers call the coupling   model, base/hooks
      h = inject(h, s); h = layer(h);       injection before a layer, update after it      coupling, layers/
      s = update(h, s)
    h -> head -> logits                     s -> head -> shadow_logits                     tasks/
    CE(logits) + w * CE(shadow_logits)      loss                                           losses/

A public name is imported when it is first used: `import shadow_peft` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shadow_peft.backbone.registration import register_projected_lm

if TYPE_CHECKING:
    from shadow_peft.backbone.explicit import prepare_shadow_model
    from shadow_peft.backbone.projected_lm import (
        AutoModelForCausalLMWithHiddenProjection,
        AutoModelForCausalLMWithHiddenProjectionConfig,
    )
    from shadow_peft.cache import ShadowCache
    from shadow_peft.cascade.cascade import ShadowCascade
    from shadow_peft.cascade.remote import RemoteModel
    from shadow_peft.config import ShadowConfig
    from shadow_peft.model import ShadowPeftModel, get_shadow_model
    from shadow_peft.multi_adapter.pool import AdapterPool
    from shadow_peft.tasks.auto import AutoShadowModelForCausalLM, AutoShadowModelForSequenceClassification
    from shadow_peft.tasks.causal_lm import ShadowCausalLMOutputWithPast, ShadowForCausalLM
    from shadow_peft.tasks.sequence_classification import (
        ShadowForSequenceClassification,
        ShadowSequenceClassifierOutput,
    )

    __version__: str

__all__ = [
    "AdapterPool",
    "AutoModelForCausalLMWithHiddenProjection",
    "AutoModelForCausalLMWithHiddenProjectionConfig",
    "AutoShadowModelForCausalLM",
    "AutoShadowModelForSequenceClassification",
    "RemoteModel",
    "ShadowCache",
    "ShadowCascade",
    "ShadowCausalLMOutputWithPast",
    "ShadowConfig",
    "ShadowForCausalLM",
    "ShadowForSequenceClassification",
    "ShadowPeftModel",
    "ShadowSequenceClassifierOutput",
    "get_shadow_model",
    "prepare_shadow_model",
]

_MODULES = {
    "AdapterPool": "multi_adapter.pool",
    "AutoModelForCausalLMWithHiddenProjection": "backbone.projected_lm",
    "AutoModelForCausalLMWithHiddenProjectionConfig": "backbone.projected_lm",
    "AutoShadowModelForCausalLM": "tasks.auto",
    "AutoShadowModelForSequenceClassification": "tasks.auto",
    "RemoteModel": "cascade.remote",
    "ShadowCache": "cache",
    "ShadowCascade": "cascade.cascade",
    "ShadowCausalLMOutputWithPast": "tasks.causal_lm",
    "ShadowConfig": "config",
    "ShadowForCausalLM": "tasks.causal_lm",
    "ShadowForSequenceClassification": "tasks.sequence_classification",
    "ShadowPeftModel": "model",
    "ShadowSequenceClassifierOutput": "tasks.sequence_classification",
    "get_shadow_model": "model",
    "prepare_shadow_model": "backbone.explicit",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from shadow_peft.storage.versions import version_of

        value: Any = version_of("shadow-peft")
    elif name in _MODULES:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


register_projected_lm()
