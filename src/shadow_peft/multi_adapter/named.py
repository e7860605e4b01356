"""The methods of `ShadowPeftModel` for several named adapters, under the names that `peft` gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.explicit import build_stored_shadow
from shadow_peft.base import peft_adapters
from shadow_peft.checkpoint import reading, store
from shadow_peft.checkpoint.mixin import CheckpointMixin
from shadow_peft.checkpoint.provenance import malformed
from shadow_peft.config import ShadowConfig
from shadow_peft.multi_adapter.exchange import exchange, pause_training, resume_training, see_base
from shadow_peft.multi_adapter.hotswap import check_swappable
from shadow_peft.multi_adapter.mixed import BASE
from shadow_peft.multi_adapter.weighted import weighted_adapter
from shadow_peft.storage.sharded import is_sharded

DEFAULT = "default"
"""Name of the first adapter, which is saved into a folder itself; others are saved into folders of their names in it."""

_NAME = re.compile(r"[\w-]+")


class NamedAdaptersMixin(CheckpointMixin):
    """The adapters of a `ShadowPeftModel`: the model is the active one, the others wait.

    Attributes:
        active_adapter: name of the active adapter, which a call without `adapter_names` uses and a training trains.
        other_adapters: name -> adapter, for all others.
    """

    active_adapter: str
    other_adapters: nn.ModuleDict
    _checkpointing_arguments: tuple[dict[str, Any] | None, dict[str, Any]]

    def _name_adapters(self, adapter_name: str) -> None:
        """Name the one adapter that there is."""
        self.other_adapters = nn.ModuleDict()
        self.active_adapter = self._checked_name(adapter_name)

    @property
    def adapter_configs(self) -> dict[str, ShadowConfig]:
        """Name -> config of every adapter, the active one first."""
        others = {name: adapter.shadow_config for name, adapter in self._others.items()}
        return {self.active_adapter: self.shadow_config, **others}

    @property
    def _others(self) -> dict[str, ShadowAdapter]:
        return cast("dict[str, ShadowAdapter]", dict(self.other_adapters.items()))

    def adapter(self, adapter_name: str) -> ShadowAdapter:
        """The trained parts of a named adapter: the model itself for the active one.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if adapter_name == self.active_adapter:
            return self
        if adapter_name not in self.other_adapters:
            raise ValueError(
                f"There is no adapter {adapter_name!r}; there are {', '.join(map(repr, self.adapter_configs))}."
            )
        return self._others[adapter_name]

    # ---------------------------------------------------------------- adding and removing

    def add_adapter(
        self,
        adapter_name: str,
        shadow_config: ShadowConfig,
        *,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter beside those that there are. It waits, frozen, until `set_adapter` activates it.

        Args:
            adapter_name: letters, digits, "_" and "-".
            shadow_config: its hyperparameters; variant, ranks and shadow may differ from those of the others.
            shadow_model: an explicit shadow; None builds an implicit one from the base.
            autocast_adapter_dtype: as in `ShadowPeftModel`.

        Raises:
            ValueError: the name is taken or impossible, or the config does not fit this base.
        """
        settings: dict[str, Any] = {"shadow_model": shadow_model, "autocast_adapter_dtype": autocast_adapter_dtype}
        self.add_fresh(adapter_name, shadow_config, **settings)

    def add_fresh(
        self,
        adapter_name: str,
        shadow_config: ShadowConfig,
        *,
        add_heads: Callable[[ShadowAdapter], None] | None = None,
        **settings: Any,
    ) -> None:
        """Add a fresh adapter; a task model passes what adds its heads. The other arguments are those of `add_adapter`."""
        self._checked_name(adapter_name)
        if shadow_config.train_base_adapters:
            raise ValueError(
                "train_base_adapters would change the base under the other adapters. Train such an adapter on a base of its "
                "own."
            )
        adapter = ShadowAdapter(self.base_model, shadow_config, **settings)
        if add_heads is not None:
            add_heads(adapter)
        self._register(adapter_name, adapter)

    def load_adapter(
        self,
        pretrained_shadow_path: str | Path,
        adapter_name: str,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Load a stored adapter beside those that there are. Stored heads belong to the task models and are left out.

        Args:
            pretrained_shadow_path: a directory, or on the hub `owner/name` or `owner/name/folder`; `@revision` may follow.
            adapter_name: a name that is free.
            is_trainable: whether it is trained once it is active.
            shadow_model: the explicit shadow of the adapter; adapters saved by this library rebuild theirs without it.
            autocast_adapter_dtype: as in `ShadowPeftModel`.

        Raises:
            ValueError: the name is taken or impossible, there is no adapter, a file is damaged, or the adapter does not fit
                this base; nothing is changed.
        """
        self._checked_name(adapter_name)
        self.add_checkpoint(
            reading.read(pretrained_shadow_path).without_heads(),
            adapter_name,
            is_trainable=is_trainable,
            shadow_model=shadow_model,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def add_checkpoint(
        self,
        stored: reading.Checkpoint,
        adapter_name: str,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
        make_head: Callable[[ShadowAdapter, str], nn.Module] | None = None,
        add_heads: Callable[[ShadowAdapter], None] | None = None,
    ) -> None:
        """Add an adapter that was read already; the other arguments are those of `load_adapter`.

        Args:
            make_head: makes the module of a trained head that the checkpoint holds.
            add_heads: adds the heads that a task wants and the checkpoint does not hold.
        """
        self._checked_name(adapter_name)
        self._require_same_base_adapters(stored)
        if shadow_model is None:
            with malformed(f"{stored.directory}: shadow_model_config"):
                shadow_model = build_stored_shadow(stored.provenance)
        settings: dict[str, Any] = {"shadow_model": shadow_model, "autocast_adapter_dtype": autocast_adapter_dtype}
        adapter = ShadowAdapter(self.base_model, stored.config, init_from_base=False, **settings)
        if make_head is not None:
            for name in stored.head_names:
                adapter.task_heads[name] = make_head(adapter, name)
        store.load_into(adapter, stored)
        if add_heads is not None:
            add_heads(adapter)
        if not is_trainable:
            for part in (*adapter.parts().values(), adapter.task_heads):
                part.requires_grad_(False)
        self._register(adapter_name, adapter)

    def hotswap_adapter(self, pretrained_shadow_path: str | Path, adapter_name: str = DEFAULT) -> None:
        """Copy a stored adapter's weights into those of an adapter that has the same shapes.

        No module and no tensor is replaced, so compiled graphs and optimizers stay valid.

        Args:
            pretrained_shadow_path: as for `load_adapter`.
            adapter_name: the adapter that gets other weights.

        Raises:
            ValueError: there is no adapter of this name, or the stored one has other shapes, another variant, alpha, dropout
                or backbone; nothing is changed.
        """
        adapter, stored = self.adapter(adapter_name), reading.read(pretrained_shadow_path)
        if stored.head_names and not adapter.task_heads:
            raise ValueError(
                f"{stored.directory} has a trained {stored.head_names[0]}, and the adapter {adapter_name!r} has none. "
                "Load it with the task model's load_adapter."
            )
        check_swappable(adapter, stored)
        self._require_same_base_adapters(stored)
        store.load_into(adapter, stored)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose corrections are the weighted sum of those of others, exactly.

        Args:
            adapters: names of the others.
            weights: a factor for each.
            adapter_name: a name that is free.

        Raises:
            ValueError: there is no such sum, with the reason: most adapters have shadows of their own, see
                `multi_adapter.weighted`; or the name is taken or impossible.
        """
        self._checked_name(adapter_name)
        self._register(adapter_name, weighted_adapter([self.adapter(name) for name in adapters], weights))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            ValueError: there is no adapter of this name, or it is the active one.
        """
        self.adapter(adapter_name)
        if adapter_name == self.active_adapter:
            raise ValueError(f"{adapter_name!r} is the active adapter; call set_adapter with another one before.")
        del self.other_adapters[adapter_name]

    def _register(self, adapter_name: str, adapter: ShadowAdapter) -> None:
        """Put an adapter beside the others, waiting."""
        pause_training(adapter)
        adapter.train(self.training)
        if self._checkpointing:
            adapter.checkpoint_backbone(*self._checkpointing_arguments)
        decoder = self.decoder
        self.attachment.hook_layers(decoder.layers, adapter.shadow_config.first_injected_layer, decoder.layer_input_name)
        self.other_adapters[adapter_name] = see_base(adapter)

    def _checked_name(self, adapter_name: str) -> str:
        """The name.

        Raises:
            ValueError: it is impossible, or taken.
        """
        possible = isinstance(adapter_name, str) and _NAME.fullmatch(adapter_name) and adapter_name != BASE
        if not possible or hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(
                f"{adapter_name!r} cannot be the name of an adapter; use letters, digits, '_' and '-', and no name that a "
                "torch module has, such as 'half' or 'train'."
            )
        if adapter_name in self.other_adapters or adapter_name == self.__dict__.get("active_adapter"):
            raise ValueError(f"There is an adapter {adapter_name!r} already; delete it before, or choose another name.")
        if is_sharded(self):
            raise ValueError("Adapters cannot be added while parameters are sharded over processes.")
        return adapter_name

    def _require_same_base_adapters(self, stored: reading.Checkpoint) -> None:
        """Refuse a checkpoint whose PEFT adapters for the base are not those that it carries.

        Raises:
            ValueError: they differ.
        """
        present = peft_adapters.views(self.base_model)
        if any(
            name not in present or not torch.equal(present[name].cpu(), tensor.to(present[name].dtype))
            for name, tensor in stored.base_adapters.items()
        ):
            raise ValueError(
                f"{stored.directory} brings PEFT adapters that this base does not carry. They would change it under the "
                "other adapters; load it onto a base of its own."
            )

    # ---------------------------------------------------------------- switching

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the context, in this thread, the model is its bare base."""
        with self.attachment.disabled():
            yield

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one: calls without `adapter_names` use it, and a training trains it.

        The one that was active is frozen and remembers what was trained of it. An optimizer holds the parameters of the
        adapter that it was made for.

        Raises:
            ValueError: there is no adapter of this name.
        """
        adapter = self.adapter(adapter_name)
        if adapter is self:
            return
        pause_training(self)
        exchange(self, adapter)
        del self.other_adapters[adapter_name]
        self.other_adapters[self.active_adapter] = adapter
        self.active_adapter = adapter_name
        resume_training(self)
        self._trained_parts_changed()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Refuse what PEFT does for adapters that are a change of weights.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A shadow adapter cannot be merged: its correction depends on the shadow's state of every token, so it is no "
            "change of the base's weights. Keep it attached, take it off with unload(), or detach the shadow with "
            "export_shadow()."
        )

    merge_adapter = unmerge_adapter = merge_and_unload

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        """Train several adapters at once, for batches that mix them; or freeze them.

        Args:
            adapter_names: one or more names.
            requires_grad: True trains what is trained of each when it is active; False freezes them.

        Raises:
            ValueError: there is no adapter of such a name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter in [self.adapter(name) for name in names]:
            (resume_training if requires_grad else pause_training)(adapter)
        self._trained_parts_changed()

    def _trained_parts_changed(self) -> None:
        """Called when other parameters are trained than before."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the layers of the base and of all backbones in the backward pass, see `ShadowAdapter`."""
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        self._checkpointing_arguments = gradient_checkpointing_kwargs, kwargs
        for adapter in self._others.values():
            adapter.checkpoint_backbone(gradient_checkpointing_kwargs, kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Save all activations of the base and of all backbones again."""
        super().gradient_checkpointing_disable()
        for adapter in self._others.values():
            adapter.save_backbone()
