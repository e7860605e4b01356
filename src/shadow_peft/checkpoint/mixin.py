"""The methods of `ShadowPeftModel` for state dicts, files and the hub.

`state_dict()` contains the adapter and the trained heads under their names in the files, and nothing of the base. So a
trainer's checkpoint is an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.explicit import build_stored_shadow
from shadow_peft.base import peft_adapters
from shadow_peft.base.hooks import Attachment, attachments_of, restored_on_failure
from shadow_peft.base.record import BaseRecord
from shadow_peft.checkpoint import native, peft, reading, store
from shadow_peft.checkpoint.folder import FILES_OF_NO_OTHERS
from shadow_peft.checkpoint.provenance import malformed
from shadow_peft.checkpoint.state_dicts import load_nested, own_entries, with_own_memory
from shadow_peft.storage.hub import push
from shadow_peft.storage.sharded import is_sharded, own_state, sharded_like
from shadow_peft.storage.tensors import fill


class CheckpointMixin(ShadowAdapter):
    """State dicts and files of a `ShadowPeftModel`."""

    @property
    def attachment(self) -> Attachment:
        """The hooks on the base."""
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
        destination.update({prefix + name: tensor for name, tensor in with_own_memory(self._state_views()).items()})
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
        own = own_entries(state_dict, views, self)
        fill(views, sharded_like(views, own) if is_sharded(self) else own, "The state dict", strict)
        return _IncompatibleKeys([name for name in views if name not in own], [])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load from the state dict of a parent module, in which torch looks for the parameters' own names."""
        _, _, missing, unexpected, errors = args
        load_nested(self, self._state_views(), state_dict, prefix, missing, unexpected, errors)
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
        """Save the adapters, see `multi_adapter.files`."""
        raise NotImplementedError

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
        """Upload the adapter to the hub in place of an earlier one. The repository is created if needed.

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
            replaces=FILES_OF_NO_OTHERS,
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
        adapter_name: str = "default",
    ) -> Self:
        """Attach a stored adapter to a base. Stored heads belong to the task models and are left out.

        Args:
            model: the base.
            pretrained_shadow_path: a directory, or on the hub `owner/name` or `owner/name/folder`; `@revision` may follow.
            is_trainable: False freezes the adapter.
            shadow_model: the explicit shadow of the adapter; adapters saved by this library rebuild theirs without it.
            autocast_adapter_dtype: keep the adapter in float32 whatever the base's dtype; False casts it to that dtype.
            adapter_name: its name in this model.

        Raises:
            ValueError: there is no adapter, a file is damaged, or the adapter does not fit the base; the base is not
                changed.
        """
        loaded: Self = cls.from_checkpoint(
            model,
            reading.read(pretrained_shadow_path).without_heads(),
            is_trainable=is_trainable,
            shadow_model=shadow_model,
            autocast_adapter_dtype=autocast_adapter_dtype,
            adapter_name=adapter_name,
        )
        return loaded

    @classmethod
    def from_checkpoint(
        cls,
        model: PreTrainedModel,
        stored: reading.Checkpoint,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
        adapter_name: str = "default",
        make_head: Callable[[Any, str], nn.Module] | None = None,
        make_task: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Attach an adapter that was read already; whatever fails leaves the base as it was.

        Args:
            make_head: makes the module of a trained head that the checkpoint holds.
            make_task: makes the task model around the adapted one, which is returned in its place.
        """
        base, origin = peft_adapters.unwrap_base(model), stored.provenance
        attach: Any = cls
        if shadow_model is None and stored.shadow_place is not None:
            raise ValueError(
                f"The shadow of {stored.directory} is made from the model {stored.shadow_place!r}: load that and pass it as "
                "shadow_model, or write the adapter anew with `shadow-peft convert --to native`."
            )
        if shadow_model is None:
            with malformed(f"{stored.directory}: shadow_model_config"):
                shadow_model = build_stored_shadow(origin) or store.mirror_with_table(base, stored)
        with restored_on_failure(base) as record:
            injected = _inject_adapters(base, stored, record)
            peft_model = attach(
                model,
                stored.config,
                shadow_model=shadow_model,
                autocast_adapter_dtype=autocast_adapter_dtype,
                init_from_base=False,
                adapter_name=adapter_name,
            )
            if injected:
                record.trains_adapters = stored.config.train_base_adapters
                peft_model.attachment.record = record
            if make_head is not None:
                for name in stored.head_names:
                    peft_model.task_heads[name] = make_head(peft_model, name)
            store.load_into(peft_model, stored)
            result: nn.Module = peft_model if make_task is None else make_task(peft_model)
            if not is_trainable:
                peft_model.freeze()
                result.eval()
        return result

    def freeze(self) -> None:
        """Freeze the adapter and the trained heads; the base too, unless another shadow on it trains its PEFT adapters."""
        for part in (*self.parts().values(), self.task_heads):
            part.requires_grad_(False)
        if len(attachments_of(self.base_model)) == 1:
            self.base_model.requires_grad_(False)


def _inject_adapters(base: PreTrainedModel, stored: reading.Checkpoint, record: BaseRecord) -> bool:
    """Put the PEFT adapters of a checkpoint into a bare base; they are part of what another shadow on it reads.

    Raises:
        ValueError: another shadow would read other adapters than those that it was trained with.
    """
    configs, present = stored.provenance.get("base_adapters") or {}, peft_adapters.views(base)
    if attachments_of(base) and any(
        name not in present or not torch.equal(present[name].cpu(), tensor.to(present[name].dtype))
        for name, tensor in stored.base_adapters.items()
    ):
        raise ValueError(
            f"{stored.directory} brings PEFT adapters for the base, which carries another shadow already; unload that first."
        )
    if present or not configs:
        return False
    with malformed(f"{stored.directory}: base_adapters"):
        peft_adapters.inject_adapters(base, configs, record)
    return True
