"""Reads a stored adapter from a directory or the hub, in either file dialect."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from shadow_peft.checkpoint import native, peft
from shadow_peft.checkpoint.folder import FILES
from shadow_peft.checkpoint.provenance import malformed, stored_provenance
from shadow_peft.config import CONFIG_FILE, ShadowConfig
from shadow_peft.storage.atomic import read_unchanged
from shadow_peft.storage.files import read_json
from shadow_peft.storage.hub import local_directory
from shadow_peft.storage.tensors import read_tensors

logger = logging.getLogger(__name__)

Dialect = Literal["native", "peft"]

PEFT_WEIGHT = ("auxiliary_loss_weight", "shadow_loss_weight")
"""The name of the shadow's loss weight in peft's config, and ours."""


@dataclass(frozen=True)
class Checkpoint:
    """A stored adapter, read but not yet loaded into a model.

    Attributes:
        config: the adapter's hyperparameters.
        dialect: dialect of the files.
        tensors: name -> tensor of the adapter.
        heads: name -> tensor of the trained heads.
        provenance: where the adapter comes from, as stored in the file; empty if nothing is stored.
        directory: directory that it was read from.
        training: stored factors of the loss, under the names of the task models' arguments.
        base_adapters: name -> tensor of the PEFT adapters that the base carried.
        shadow_place: folder or hub id of the model that a shadow of peft's is made from; None where it is made otherwise.
    """

    config: ShadowConfig
    dialect: Dialect
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor]
    provenance: dict[str, Any]
    directory: Path
    training: dict[str, float] = field(default_factory=dict)
    base_adapters: dict[str, Tensor] = field(default_factory=dict)
    shadow_place: str | None = None

    @property
    def head_names(self) -> list[str]:
        """Names of the trained heads in the checkpoint."""
        return sorted({name.partition(".")[0] for name in self.heads})

    def require_heads(self, names: Iterable[str]) -> None:
        """Refuse a checkpoint that names heads of a task model and does not hold them.

        Raises:
            ValueError: naming the file.
        """
        declared = self.provenance.get("heads", self.config.modules_to_save)
        missing = sorted(set(declared) & set(names) - set(self.head_names))
        if missing:
            raise ValueError(
                f"{self.directory} was saved with trained heads, but {native.HEADS_FILE} with {' and '.join(missing)} is "
                "not there; copy or download it too."
            )

    def without_heads(self) -> Checkpoint:
        """The same checkpoint for a model without task heads."""
        if self.heads:
            heads = " and ".join(self.head_names)
            logger.warning("%s also holds %s; load it with a task model to get them.", self.directory, heads)
        return replace(self, heads={}, config=replace(self.config, modules_to_save=[]))


def read(path_or_repo: str | Path) -> Checkpoint:
    """Read a checkpoint of either dialect.

    Raises:
        ValueError: no checkpoint is there, or a file of it is missing or damaged.
    """
    directory = local_directory(path_or_repo)
    return read_unchanged(directory, FILES, lambda files: _read(directory, files))


def _read(directory: Path, files: Mapping[str, Path]) -> Checkpoint:
    if CONFIG_FILE in files:
        return _read_native(directory, files)
    if peft.CONFIG_FILE in files:
        return _read_peft(directory, files)
    raise ValueError(
        f"{directory} holds no shadow adapter: neither {CONFIG_FILE} (shadow-peft) nor {peft.CONFIG_FILE} (peft)."
    )


def _read_native(directory: Path, files: Mapping[str, Path]) -> Checkpoint:
    stored = read_json(files[CONFIG_FILE])
    with malformed(files[CONFIG_FILE]):
        config, origin = ShadowConfig.from_dict(stored), stored_provenance(stored, FILES)
    file = native.adapter_file(config.variant)
    if file not in files and native.LEGACY_ADAPTER_FILE in files:
        file = native.LEGACY_ADAPTER_FILE
    return _with_tensors(Checkpoint(config, "native", {}, {}, origin, directory, origin.get("training", {})), file, files)


def _read_peft(directory: Path, files: Mapping[str, Path]) -> Checkpoint:
    data = read_json(files[peft.CONFIG_FILE])
    with malformed(files[peft.CONFIG_FILE]):
        origin = stored_provenance(data, FILES)
        config = peft.config_from_peft(data, origin.get("shadow_config", {}))
        training = {PEFT_WEIGHT[1]: float(data.get(PEFT_WEIGHT[0], 0.05)), **origin.get("training", {})}
        place = None if origin or peft.is_mirror(data) else str(data["shadow_model"])
    checkpoint = Checkpoint(config, "peft", {}, {}, origin, directory, training, shadow_place=place)
    return _with_tensors(checkpoint, peft.ADAPTER_FILE, files)


def _with_tensors(checkpoint: Checkpoint, adapter_file: str, files: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint with the tensors of all files that its config names; files that it does not name are left alone.

    Raises:
        ValueError: one of them is missing.
    """
    directory, origin = checkpoint.directory, checkpoint.provenance
    named = set(origin.get("files", files))
    if origin.get("base_adapters"):
        named.add(native.BASE_ADAPTER_FILE)
    tensors = {}
    for name in (adapter_file, *sorted({native.HEADS_FILE, native.BASE_ADAPTER_FILE} & named)):
        if name not in files:
            raise ValueError(f"{directory} has a config but no {name}, which it was saved with; copy or download it too.")
        tensors[name] = read_tensors(files[name])
    heads, base = (tensors.get(name, {}) for name in (native.HEADS_FILE, native.BASE_ADAPTER_FILE))
    read = replace(checkpoint, tensors=tensors[adapter_file], heads=heads, base_adapters=base)
    read.require_heads(origin.get("heads", ()))
    return read
