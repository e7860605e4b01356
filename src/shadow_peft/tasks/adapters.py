"""The adapters of a task model: the verbs of `peft`, with the task's heads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.checkpoint import reading
from shadow_peft.config import ShadowConfig
from shadow_peft.model import ShadowPeftModel


class TaskAdaptersMixin:
    """Named adapters of a task model; each has the heads that the task gives it.

    Attributes:
        peft_model: the adapted base with its adapters.
    """

    peft_model: ShadowPeftModel

    @classmethod
    def _check_heads(cls, config: ShadowConfig) -> None:
        raise NotImplementedError

    @classmethod
    def _add_heads(cls, adapter: ShadowAdapter) -> None:
        raise NotImplementedError

    @classmethod
    def _fresh_head(cls, adapter: ShadowAdapter, name: str) -> nn.Module:
        raise NotImplementedError

    @classmethod
    def _read(cls, path_or_repo: str | Path) -> reading.Checkpoint:
        raise NotImplementedError

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that a call without `adapter_names` uses, and that a training trains."""
        return self.peft_model.active_adapter

    def add_adapter(self, adapter_name: str, shadow_config: ShadowConfig, **settings: Any) -> None:
        """Add a fresh adapter with its heads, see `ShadowPeftModel.add_adapter`.

        Raises:
            ValueError: also if `modules_to_save` names a head that this task does not have.
        """
        self._check_heads(shadow_config)
        self.peft_model.add_fresh(adapter_name, shadow_config, add_heads=self._add_heads, **settings)

    def load_adapter(self, pretrained_shadow_path: str | Path, adapter_name: str, **settings: Any) -> None:
        """Load a stored adapter with its heads, see `ShadowPeftModel.load_adapter`. The factors of the loss stay.

        Raises:
            ValueError: also if it has heads of another task.
        """
        stored = self._read(pretrained_shadow_path)
        self.peft_model.add_checkpoint(
            stored, adapter_name, make_head=self._fresh_head, add_heads=self._add_heads, **settings
        )

    def hotswap_adapter(self, pretrained_shadow_path: str | Path, adapter_name: str = "default") -> None:
        """Copy stored weights into those of an adapter of the same shapes, see `ShadowPeftModel.hotswap_adapter`."""
        self.peft_model.hotswap_adapter(pretrained_shadow_path, adapter_name)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add the weighted sum of adapters, see `ShadowPeftModel.add_weighted_adapter`; their heads must be the same."""
        self.peft_model.add_weighted_adapter(adapters, weights, adapter_name)

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one, see `ShadowPeftModel.set_adapter`."""
        self.peft_model.set_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not active, see `ShadowPeftModel.delete_adapter`."""
        self.peft_model.delete_adapter(adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside the context, in this thread, the model is its bare base."""
        return self.peft_model.disable_adapter()

    def get_base_model(self) -> PreTrainedModel:
        """The base, still attached; calling it is calling the bare base."""
        return self.peft_model.get_base_model()

    def unload(self) -> PreTrainedModel:
        """Remove the adapter and give back what was wrapped, see `ShadowPeftModel.unload`."""
        return self.peft_model.unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """A shadow adapter cannot be merged, see `ShadowPeftModel.merge_and_unload`."""
        return self.peft_model.merge_and_unload(*args, **kwargs)
