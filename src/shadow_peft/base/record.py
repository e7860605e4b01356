"""What a base was before shadows were attached to it, so that it can be restored bit for bit.

A module or tensor that is replaced is kept and given back. Only weights that are about to be modified in place are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class BaseRecord:
    """The state of a base.

    Attributes:
        trains_adapters: whether one of the shadows on it trains the PEFT adapters that it carries.
        replaced: path -> module that has been replaced, once `keep_changes` was called.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.trains_adapters = False
        self._trainable = {name for name, p in base.named_parameters() if p.requires_grad}
        self._training = {name: module.training for name, module in base.named_modules()}
        self._checkpointed = _checkpointed(base)
        self._attributes = set(vars(base))
        self.replaced: dict[str, nn.Module] = dict(base.named_modules())
        self._weights = [_Weight(module, name) for module in base.modules() for name in module._parameters]
        self._added: set[str] = set()

    def copy_weights(self, modules: Mapping[str, nn.Module]) -> None:
        """Copy the weights of some modules that are about to be modified in place."""
        for weight in self._weights:
            if any(weight.module is module for module in modules.values()):
                weight.copy()

    def keep_changes(self, base: PreTrainedModel) -> None:
        """Keep only what has been replaced since; nothing else of the base is held in memory afterwards."""
        now = dict(base.named_modules())
        self.replaced = {path: module for path, module in self.replaced.items() if now.get(path) is not module}
        self._weights = [weight for weight in self._weights if weight.was_changed()]
        self._added = set(vars(base)) - self._attributes

    def restore(self, base: PreTrainedModel) -> None:
        """Restore everything, once `keep_changes` was called."""
        for path, module in sorted(self.replaced.items()):  # a module before those inside of it
            parent, _, name = path.rpartition(".")
            base.get_submodule(parent)._modules[name] = module
        for weight in self._weights:
            weight.restore_weight()
        for name in self._added:
            vars(base).pop(name, None)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        if any(_checkpointed(base).values()) and not any(self._checkpointed.values()):
            base.activation_checkpointing_disable()
            base.disable_input_require_grads()
        base.train(self._training[""])  # some layers do more in `train` than set their flag
        for name, module in base.named_modules():
            module.training = self._training.get(name, self._training[""])
            if name in self._checkpointed:
                vars(module)["gradient_checkpointing"] = self._checkpointed[name]


class _Weight:
    """A parameter of a module, its memory and, where that is about to be modified, a copy of its values."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.parameter: nn.Parameter | None = module._parameters[name]
        self.data: Any = None if self.parameter is None else self.parameter.data
        self.values: Tensor | None = None

    def copy(self) -> None:
        self.values = None if self.data is None else self.data.clone()

    def was_changed(self) -> bool:
        now = self.module._parameters.get(self.name)
        if now is None or now is not self.parameter:
            return now is not self.parameter
        return not _same_memory(now, self.data) or (self.values is not None and not torch.equal(now, self.values))

    def restore_weight(self) -> None:
        now = self.module._parameters.get(self.name)
        self.module._parameters[self.name] = self.parameter
        if self.parameter is None:
            return
        if self.values is not None:
            self.data.copy_(self.values)
        like = self.data if now is None else now
        self.parameter.data = self.data.to(like.device, like.dtype if like.is_floating_point() else self.data.dtype)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    try:
        return one.data_ptr() == other.data_ptr()
    except RuntimeError:  # a quantized tensor made of several others
        return True


def _checkpointed(base: nn.Module) -> dict[str, bool]:
    """Path -> whether activations are checkpointed there, for the modules that can."""
    return {
        path: vars(module)["gradient_checkpointing"]
        for path, module in base.named_modules()
        if "gradient_checkpointing" in vars(module)
    }
