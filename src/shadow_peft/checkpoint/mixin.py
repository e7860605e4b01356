"""The adapter of a model as tensors and files: counted, saved, uploaded, exported.

`state_dict()` holds the adapter and the trained heads under their names in the files and nothing of the base, so a trainer's
checkpoint is an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from shadow_peft.base import peft_adapters
from shadow_peft.checkpoint import native, peft, store
from shadow_peft.export.stock import build_standalone_model
from shadow_peft.storage.hub import push
from shadow_peft.storage.sharded import is_sharded, own_state, sharded_like
from shadow_peft.storage.tensors import fill

if TYPE_CHECKING:
    from shadow_peft.model import ShadowPeftModel


class AdapterFiles(nn.Module):
    """What a `ShadowPeftModel` can do with its adapter's tensors."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of trainable parameters, and of all parameters."""
        counts = [(p.numel() if p.requires_grad else 0, p.numel()) for p in self.parameters()]
        return sum(t for t, _ in counts), sum(n for _, n in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors under their names in the file, without task heads; they share memory with the model."""
        return self._adapter_views()

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `adapter_state_dict` returned into this model.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing is changed then.
        """
        shared = store.shared_table(self._model)
        fill(self._adapter_views(), {n: t for n, t in state.items() if n not in shared}, "The adapter state dict")

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The adapter's tensors and the trained heads, nothing of the base: what a trainer's checkpoint needs.

        While parameters are sharded over processes, their names are those of the parameters, see `sharded`.
        """
        destination = {} if destination is None else destination
        destination.update({prefix + name: view for name, view in self._state_views().items()})
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy what `state_dict` returned into this model; without `strict`, a part of it.

        Returns:
            torch's pair of missing and unexpected keys, the latter always empty.

        Raises:
            ValueError: a tensor is unknown or of another shape or, with `strict`, missing; nothing is changed then.
        """
        views = self._state_views()
        if is_sharded(self):  # torch's loader adds the base's own parameters to what it was given
            own = {name: tensor for name, tensor in state_dict.items() if not name.startswith("base_model.")}
            state_dict = sharded_like(views, own)
        fill(views, state_dict, "The state dict", strict)
        return _IncompatibleKeys([name for name in views if name not in state_dict], [])

    def _state_views(self) -> dict[str, Tensor]:
        model = self._model
        if not is_sharded(self):
            return {**self._adapter_views(), **native.head_views(model), **peft_adapters.views(model.base_model)}
        if model.shadow_config.train_base_adapters:
            raise ValueError("Adapters of the base cannot be trained while parameters are sharded over processes.")
        return own_state(self, without="base_model")

    def _adapter_views(self) -> dict[str, Tensor]:
        if is_sharded(self):
            raise ValueError(
                "The adapter's parameters are sharded over processes; gather them with accelerator.get_state_dict(model)."
            )
        return (peft if self._model.shadow_config.variant == "paper" else native).adapter_views(self._model)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the adapter and the trained heads; the arguments are those of `checkpoint.store.save`."""
        store.save(self._model, save_directory, **kwargs)

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
        """Upload the adapter to the hub, creating the repository if needed; returns the address of the commit.

        `save` is who writes the files, where a task model has more to say than the adapter knows.
        """
        return push(
            self.save_pretrained if save is None else save,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    def export_shadow(self) -> PreTrainedModel:
        """The shadow alone as a self-contained model, see `export.standalone`.

        Raises:
            ValueError: parameters are sharded over processes.
        """
        if is_sharded(self):
            raise ValueError("The model is sharded over processes; save the adapter and export it from one process.")
        return build_standalone_model(self._model)

    @property
    def _model(self) -> ShadowPeftModel:
        return cast("ShadowPeftModel", self)
