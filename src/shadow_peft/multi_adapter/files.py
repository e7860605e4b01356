"""Saving the adapters of a model into folders of their names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from shadow_peft.checkpoint import store
from shadow_peft.checkpoint.folder import is_trainer_folder
from shadow_peft.multi_adapter.named import DEFAULT, NamedAdaptersMixin


class AdapterFilesMixin(NamedAdaptersMixin):
    """The files of a `ShadowPeftModel` with its adapters."""

    def save_pretrained(
        self, save_directory: str | Path, *, selected_adapters: Collection[str] | None = None, **kwargs: Any
    ) -> None:
        """Save adapters and their trained heads; an interrupted save leaves what was there before.

        The adapter "default" is saved into the folder itself, others into folders of their names in it. A folder that a
        `Trainer` resumes from (`checkpoint-500`) holds the active adapter alone, in itself.

        Args:
            save_directory: created when it is missing.
            selected_adapters: names of the adapters to save; None saves all.
            **kwargs: `include_shared_embeddings=True` also stores the base's embedding table where shadow-peft 0.1.x needs
                one; `is_main_process=False` writes nothing; `state_dict` is the gathered `state_dict()` of a sharded model.

        Raises:
            ValueError: there is no adapter of such a name, a folder holds something else, or the parameters are sharded over
                processes and `state_dict` does not have all of them.
        """
        directory = Path(save_directory)
        if is_trainer_folder(directory) or kwargs.get("state_dict") is not None:
            why = "a trainer's folder and a state dict hold the active adapter alone"
            _require_names(selected_adapters or (), [self.active_adapter], why)
            return store.save(self, directory, **kwargs)
        names = self.adapter_configs if selected_adapters is None else selected_adapters
        _require_names(names, self.adapter_configs, "those are the adapters that there are")
        targets = {name: directory if name == DEFAULT else directory / name for name in names}
        if len(targets) > 1 and kwargs.get("is_main_process", True):
            for name, target in targets.items():
                store.check_save(self.adapter(name), target, **kwargs)
        for name, target in targets.items():
            store.save(self.adapter(name), target, **kwargs)


def _require_names(selected: Collection[str], possible: Collection[str], why: str) -> None:
    """Refuse to save other adapters than the possible ones.

    Raises:
        ValueError: others are named.
    """
    if not set(selected) <= set(possible):
        raise ValueError(
            f"save_pretrained(selected_adapters={list(selected)!r}) is not possible; choose from {list(possible)}: {why}."
        )
