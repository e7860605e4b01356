"""PEFT adapters that the base carries, LoRA or whatever else `peft` puts into layers: trained and stored with a shadow.

A base may come as a `peft.PeftModel` or with adapters injected. They take part in every forward of the base, and
`ShadowConfig(train_base_adapters=True)` trains the active ones together with the shadow. Either way they are stored with
the adapter, as a shadow is worth what the base under it is, and put into a bare base when it is loaded.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.base.record import BaseRecord

logger = logging.getLogger(__name__)

PREFIX = "base_adapter."
"""Goes before the names of their parameters in files and state dicts."""


def unwrap_base(model: Any) -> PreTrainedModel:
    """The transformers model that a `peft.PeftModel` holds, or the model itself.

    Raises:
        TypeError: not a transformers model.
        ValueError: the method of the PeftModel is none that lives in layers, such as prompt tuning.
    """
    base = model
    if hasattr(model, "peft_type") and hasattr(model, "get_base_model"):
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"A base with {config.peft_type.value} cannot carry a shadow: its prompts live outside of layers."
            )
        base = model.get_base_model()
    if isinstance(base, str):
        raise TypeError(f"Got the name {base!r}; load the base first: AutoModelForCausalLM.from_pretrained({base!r}).")
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"The base must be a transformers PreTrainedModel, got {type(base).__name__}.")
    return base


def tuned_modules(base: nn.Module) -> dict[str, Any]:
    """Path -> module, for every module of the base that peft has put an adapter into."""
    return {path: module for path, module in base.named_modules() if hasattr(module, "adapter_layer_names")}


def adapter_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """Name in the base -> parameter, for all parameters of its adapters."""
    return {
        f"{path}.{name}": parameter
        for path, module in tuned_modules(base).items()
        for part in module.adapter_layer_names
        for name, parameter in _named_below(module, part).items()
    }


def _named_below(module: nn.Module, part: str) -> dict[str, nn.Parameter]:
    held = getattr(module, part)
    below = held.named_parameters() if isinstance(held, (nn.Module, nn.ParameterDict)) else ()
    return {f"{part}.{name}": parameter for name, parameter in below}


def freeze(base: nn.Module, but_adapters: bool) -> None:
    """Freeze a base, but for its active adapters where those are to be trained.

    Raises:
        ValueError: they are, and it carries none; nothing is changed then.
    """
    modules = tuned_modules(base)
    if but_adapters and not modules:
        raise ValueError("train_base_adapters is set, but the base carries no PEFT adapter.")
    base.requires_grad_(False)
    for module in modules.values() if but_adapters else ():
        module.set_adapter(module.active_adapters)


def stored_configs(base: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Name -> config of the base's adapters, as plain JSON."""
    if not tuned_modules(base):
        return {}
    configs: dict[str, Any] = getattr(base, "peft_config", {})
    return {name: json.loads(json.dumps(config.to_dict(), default=_plain)) for name, config in configs.items()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def views(base: nn.Module) -> dict[str, Tensor]:
    """Name in the file -> parameter, sharing memory with the base."""
    return {PREFIX + name: parameter.detach() for name, parameter in adapter_parameters(base).items()}


def inject_adapters(base: PreTrainedModel, configs: dict[str, dict[str, Any]], record: BaseRecord) -> None:
    """Put fresh adapters of stored configs into a bare base, to be loaded.

    Some of their initialisations (PiSSA, OLoRA and others) change the base's own weights, as they did where the adapters
    were made; the record gets copies of these.

    Args:
        base: carries no adapters.
        configs: name -> stored config.
        record: of the base, which `record.restore` gives back without the adapters.

    Raises:
        ValueError: `peft` is not installed.
    """
    inits = [stored.get(_INIT) for stored in configs.values()]
    if any("_niter_" in str(init) for init in inits):
        logger.warning("PiSSA by a randomised SVD cannot be repeated exactly: the adapter's outputs will differ a little.")
    if not all(init in _INITS_BESIDE_BASE for init in inits):
        trial = BaseRecord(base)
        _inject(base, {name: {**stored, _INIT: False} if _INIT in stored else stored for name, stored in configs.items()})
        trial.keep_changes(base)
        trial.restore(base)
        record.copy_weights(trial.replaced)
    _inject(base, configs)
    record.keep_changes(base)


_INIT = "init_lora_weights"
_INITS_BESIDE_BASE = (None, True, False, "gaussian", "orthogonal")
"""Ways to initialise a LoRA that leave the base's weights alone."""


def _inject(base: PreTrainedModel, configs: dict[str, dict[str, Any]]) -> None:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ValueError("This adapter was made on a base with PEFT adapters; install `peft` to load it.") from error
    wrapped: Any = None
    for name, stored in configs.items():
        config = PeftConfig.from_peft_type(**stored)
        if wrapped is None:
            wrapped = get_peft_model(base, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
