"""Tells transformers of the projected causal LM, without importing transformers or torch for it.

`import shadow_peft` promises that `AutoConfig` and `AutoModelForCausalLM` load a projected model. Their registry,
`CONFIG_MAPPING`, is given a placeholder of its config class: at once if transformers has made the registry already, else as
soon as it does. Only when a projected model is met does the placeholder import `projected_lm`, which registers the real
config and model in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODEL_TYPE = "causal_lm_with_hidden_projection"

_REGISTRY = "transformers.models.auto.configuration_auto"


class _Placeholder(type):
    """Type of a class whose attributes and instances are those of the class of the same name in `projected_lm`."""

    def _real(cls) -> Any:
        return getattr(import_module("shadow_peft.backbone.projected_lm"), cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._real(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real()(*args, **kwargs)


class AutoModelForCausalLMWithHiddenProjectionConfig(metaclass=_Placeholder):
    """Stands in the registry for the class of this name until it is used."""


class _AfterImport(MetaPathFinder):
    """Registers right after the registry's module was executed: an ordinary import, with one step behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's own spec; None for every other module."""
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_projected_lm() -> None:
    """Makes `model_type` "causal_lm_with_hidden_projection" known to transformers, now or when it is imported."""
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(registry: ModuleType) -> None:
    if MODEL_TYPE not in registry.CONFIG_MAPPING:
        registry.CONFIG_MAPPING.register(MODEL_TYPE, AutoModelForCausalLMWithHiddenProjectionConfig)
