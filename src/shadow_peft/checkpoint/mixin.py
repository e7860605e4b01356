"""The methods of `ShadowPeftModel` for state dicts, files and the hub.

`state_dict()` contains the adapter and the trained heads under their names in the files, and nothing of the base. So a
trainer's checkpoint is an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.explicit import build_stored_shadow
from shadow_peft.base import peft_adapters
from shadow_peft.checkpoint import native, peft, store
from shadow_peft.storage.hub import push
from shadow_peft.storage.sharded import is_sharded, own_state, sharded_like
from shadow_peft.storage.tensors import fill

_WRAPPERS = ("module.", "_orig_mod.", "peft_model.")
"""Prefixes that wrappers and parent modules add to the names of a state dict."""


class CheckpointMixin(ShadowAdapter):
    """State dicts and files of a `ShadowPeftModel`."""

    def unload(self) -> PreTrainedModel:
        """Remove the adapter from its base."""
        raise NotImplementedError

    # ---------------------------------------------------------------- tensors

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors under their names in the file, without task heads. They share memory with the model."""
        return self._adapter_views()

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors that `adapter_state_dict` returned into this model.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing is changed.
        """
        shared = store.shared_table(self)
        fill(self._adapter_views(), {n: t for n, t in state.items() if n not in shared}, "The adapter state dict")

    def state_dict(  # type: ignore[override]
        self, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The adapter's tensors and the trained heads under their names in the files; nothing of the base.

        While parameters are sharded over processes, the names are those of the parameters.
        """
        destination = {} if destination is None else destination
        destination.update({prefix + name: _with_own_storage(view) for name, view in self._state_views().items()})
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy a state dict of this model, or of a module around it, into this model.

        Prefixes of wrappers (`module.`, `peft_model.`) are removed. The base's own parameters are ignored.

        Args:
            state_dict: name -> tensor.
            strict: every tensor of the adapter must be there.
            assign: ignored; the tensors are always copied.

        Returns:
            torch's pair of missing and unexpected keys, the latter always empty.

        Raises:
            ValueError: a tensor is unknown or of another shape or, with `strict`, missing; nothing is changed.
        """
        views = self._state_views()
        own = _own_entries(state_dict, views)
        fill(views, sharded_like(views, own) if is_sharded(self) else own, "The state dict", strict)
        return _IncompatibleKeys([name for name in views if name not in own], [])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a part of a parent module's state dict; torch calls this and expects the parameters' own names."""
        load_nested(self, self._state_views(), state_dict, prefix, args[1], args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _state_views(self) -> dict[str, Tensor]:
        if not is_sharded(self):
            return {**self._adapter_views(), **native.head_views(self), **peft_adapters.views(self.base_model)}
        if self.shadow_config.train_base_adapters:
            raise ValueError("Adapters of the base cannot be trained while parameters are sharded over processes.")
        return own_state(self, without="base_model")

    def _adapter_views(self) -> dict[str, Tensor]:
        if is_sharded(self):
            raise ValueError(
                "The adapter's parameters are sharded over processes; gather them with accelerator.get_state_dict(model)."
            )
        return (peft if self.shadow_config.variant == "peft" else native).adapter_views(self)

    # ---------------------------------------------------------------- files

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the adapter and the trained heads; an interrupted save leaves what was there before.

        Args:
            save_directory: created when it is missing.
            **kwargs: `include_shared_embeddings=True` also stores the base's embedding table where shadow-peft 0.1.x needs
                one; `is_main_process=False` writes nothing; `state_dict` is the gathered `state_dict()` of a sharded model.

        Raises:
            ValueError: the parameters are sharded over processes, and `state_dict` does not have all of them.
        """
        store.save(self, save_directory, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Add shadow adapter",
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        save: Callable[[str], None] | None = None,
    ) -> str:
        """Upload the adapter to the hub. The repository is created if needed.

        Args:
            repo_id: name of the repository.
            commit_message: message of the commit.
            private: make a new repository private.
            token: access token; None uses the stored login.
            revision: branch to push to; it is created if it is missing.
            create_pr: open a pull request instead.

        Returns:
            The address of the commit or of the pull request.
        """
        # a task model passes `save`, since it stores more than the adapter
        return push(
            self.save_pretrained if save is None else save,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        pretrained_shadow_path: str | Path,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> Self:
        """Attach a stored adapter to a base. Stored heads belong to the task models and are left out.

        Args:
            model: the base.
            pretrained_shadow_path: a directory, or a hub repository `repo_id` or `repo_id@revision`, of either dialect.
            is_trainable: False freezes the adapter.
            shadow_model: the explicit shadow of the adapter; adapters saved by this library rebuild theirs without it.
            autocast_adapter_dtype: keep the adapter in float32 whatever the base's dtype; False casts it to that dtype.

        Raises:
            ValueError: there is no adapter, a file is damaged, or the adapter does not fit the base; the base is not
                changed.
        """
        return cls.from_checkpoint(
            model,
            store.read(pretrained_shadow_path).without_heads(),
            is_trainable=is_trainable,
            shadow_model=shadow_model,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def from_checkpoint(
        cls,
        model: PreTrainedModel,
        stored: store.Checkpoint,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
        make_head: Callable[[Any, str], nn.Module] | None = None,
    ) -> Self:
        """Attach an adapter that was read already; `make_head` makes the modules of its trained heads."""
        if shadow_model is None:
            shadow_model = build_stored_shadow(stored.provenance)
        base = peft_adapters.unwrap_base(model)
        injected = peft_adapters.inject_adapters(base, stored.provenance.get("base_adapters") or {})
        try:
            peft_model = cls(
                model,
                stored.config,
                shadow_model=shadow_model,
                autocast_adapter_dtype=autocast_adapter_dtype,
                init_from_base=False,
            )
        except BaseException:
            peft_adapters.remove_adapters(base, injected)
            raise
        peft_model._injected_adapters = () if injected is None else (injected,)
        try:
            if make_head is not None:
                for name in stored.head_names:
                    peft_model.task_heads[name] = make_head(peft_model, name)
            store.load_into(peft_model, stored)
        except ValueError:
            peft_model.unload()
            raise
        if not is_trainable:
            peft_model.requires_grad_(False).eval()
        return peft_model


def load_nested(
    module: nn.Module, views: Mapping[str, Tensor], state_dict: dict[str, Any], prefix: str, strict: bool, errors: list[str]
) -> None:
    """Copy a part of a parent's state dict into views, then replace that part by the module's own parameters.

    Args:
        module: the module that torch is about to load.
        views: name in files -> destination.
        state_dict: state dict of the parent; changed in place.
        prefix: prefix of the module's names in it.
        strict: every view must have a value.
        errors: list to which problems are added, as torch expects it.
    """
    entries = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    try:
        own = _own_entries({name[len(prefix) :]: tensor for name, tensor in entries.items()}, views)
        fill(views, own, f"The state dict at {prefix!r}", strict)
    except ValueError as error:
        errors.append(str(error))
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        state_dict[prefix + name] = tensor  # the parameter itself: torch copies nothing and reports nothing missing


def _own_entries(state_dict: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries without the prefixes of wrappers and without the base's own parameters."""
    entries = {_unwrapped(name, known): tensor for name, tensor in state_dict.items()}
    return {name: tensor for name, tensor in entries.items() if not name.startswith("base_model.")}


def _with_own_storage(view: Tensor) -> Tensor:
    """A tensor with a storage of its own: slices of stacked weights are copied."""
    if type(view) is not Tensor or view.untyped_storage().nbytes() == view.numel() * view.element_size():
        return view
    return view.clone()


def _unwrapped(name: str, known: Mapping[str, Tensor]) -> str:
    """A name without the prefixes of wrappers; `known` are the names of the model inside."""
    while name not in known:
        prefix = next((p for p in _WRAPPERS if name.startswith(p)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name
