"""PEFT adapters that the base carries, LoRA or whatever else `peft` puts into layers: trained and stored with a shadow.

A base may come as a `peft.PeftModel` or with adapters injected. They take part in every forward of the base, and
`ShadowConfig(train_base_adapters=True)` trains the active ones together with the shadow. Either way they are stored with
the adapter, as a shadow is worth what the base under it is, and put into a bare base when it is loaded.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

PREFIX = "base_adapter."
"""Goes before the names of their parameters in files and state dicts."""


def unwrap_base(model: Any) -> PreTrainedModel:
    """The transformers model that a `peft.PeftModel` holds, or the model itself.

    Raises:
        ValueError: the method of the PeftModel is none that lives in layers, such as prompt tuning.
    """
    if not hasattr(model, "peft_type") or not hasattr(model, "get_base_model"):
        bare: PreTrainedModel = model
        return bare
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(f"A base with {config.peft_type.value} cannot carry a shadow: its prompts live outside of layers.")
    base: PreTrainedModel = model.get_base_model()
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


def inject_adapters(base: PreTrainedModel, configs: dict[str, dict[str, Any]]) -> Any:
    """Put fresh adapters of stored configs into a bare base, to be loaded.

    Returns:
        The `peft.PeftModel` around it, for `remove_adapters`; None where the base carries adapters, or none are asked for.

    Raises:
        ValueError: `peft` is not installed.
    """
    if not configs or tuned_modules(base):
        return None
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
    return wrapped


def remove_adapters(base: PreTrainedModel, wrapped: Any) -> None:
    """Undo `inject_adapters`."""
    if wrapped is not None:
        wrapped.unload()
        vars(base).pop("peft_config", None)
