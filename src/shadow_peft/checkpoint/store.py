"""Saves an adapter into a directory and reads it from a directory or the hub, in either file dialect."""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base import peft_adapters
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.checkpoint import native, peft
from shadow_peft.config import CONFIG_FILE, ShadowConfig
from shadow_peft.storage.files import all_or_none, read_json, write_json
from shadow_peft.storage.hub import local_directory
from shadow_peft.storage.sharded import is_sharded, own_state, parameters_replaced
from shadow_peft.storage.tensors import fill, read_tensors, write_tensors

logger = logging.getLogger(__name__)

Dialect = Literal["native", "peft"]

FILES = frozenset(
    {native.ADAPTER_FILE, native.READOUT_FILE, native.LEGACY_ADAPTER_FILE, native.HEADS_FILE, CONFIG_FILE}
    | {native.BASE_ADAPTER_FILE}
    | {peft.ADAPTER_FILE, peft.CONFIG_FILE}
)
"""All names that an adapter's files can have; a save removes those of an earlier save."""

INDEX_FILE = "model.safetensors.index.json"
"""transformers' index of a checkpoint in several files; a Trainer resumes only from a folder that has known weights."""

_TRAINER_FOLDER = re.compile(r"(last-)?checkpoint(-\d+)?")
"""Names that a Trainer gives the folders it may resume from; no other folder gets an index."""


_PEFT_WEIGHT = ("auxiliary_loss_weight", "shadow_loss_weight")
"""The name of the shadow's loss weight in peft's config, and ours."""


@dataclass(frozen=True)
class Checkpoint:
    """A stored adapter, read but not yet loaded into a model.

    Attributes:
        config: the adapter's hyperparameters.
        dialect: dialect of the files.
        tensors: name -> tensor of the adapter.
        heads: name -> tensor of the trained heads.
        base_adapters: name -> tensor of the PEFT adapters that the base carried.
        provenance: where the adapter comes from, as stored in the file; empty if nothing is stored.
        directory: directory that it was read from.
        training: stored factors of the loss, under the names of the task models' arguments.
    """

    config: ShadowConfig
    dialect: Dialect
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor]
    provenance: dict[str, Any]
    directory: Path
    training: dict[str, float] = field(default_factory=dict)
    base_adapters: dict[str, Tensor] = field(default_factory=dict)

    @property
    def head_names(self) -> list[str]:
        """Names of the trained heads in the checkpoint."""
        return sorted({name.partition(".")[0] for name in self.heads})

    def without_heads(self) -> Checkpoint:
        """The same checkpoint for a model without task heads."""
        if self.heads:
            heads = " and ".join(self.head_names)
            logger.info("%s also holds %s; load it with a task model to get them.", self.directory, heads)
        return replace(self, heads={}, config=replace(self.config, modules_to_save=[]))


def read(path_or_repo: str | Path) -> Checkpoint:
    """Read a checkpoint of either dialect.

    Raises:
        ValueError: there is no checkpoint, or a file of it is damaged.
    """
    directory = local_directory(path_or_repo)
    if (directory / CONFIG_FILE).is_file():
        return _read_native(directory)
    if (directory / peft.CONFIG_FILE).is_file():
        return _read_peft(directory)
    raise ValueError(
        f"{directory} holds no shadow adapter: neither {CONFIG_FILE} (shadow-peft) nor {peft.CONFIG_FILE} (peft)."
    )


def _read_native(directory: Path) -> Checkpoint:
    stored = read_json(directory / CONFIG_FILE)
    config = ShadowConfig.from_dict(stored)
    file, legacy = native.adapter_file(config.variant), directory / native.LEGACY_ADAPTER_FILE
    use_legacy = legacy.is_file() and not (directory / file).is_file()
    tensors = read_tensors(legacy) if use_legacy else _required(directory, file)
    heads, base = (_if_there(directory / name) for name in (native.HEADS_FILE, native.BASE_ADAPTER_FILE))
    origin = stored.get("provenance", {})
    return Checkpoint(config, "native", tensors, heads, origin, directory, origin.get("training") or {}, base)


def _if_there(file: Path) -> dict[str, Tensor]:
    return read_tensors(file) if file.is_file() else {}


def _read_peft(directory: Path) -> Checkpoint:
    data = read_json(directory / peft.CONFIG_FILE)
    config = peft.config_from_peft(data)
    tensors = _required(directory, peft.ADAPTER_FILE)
    origin = data.get("provenance", {})
    training = {_PEFT_WEIGHT[1]: float(data.get(_PEFT_WEIGHT[0], 0.05)), **(origin.get("training") or {})}
    return Checkpoint(config, "peft", tensors, {}, origin, directory, training)


def _required(directory: Path, name: str) -> dict[str, Tensor]:
    if not (directory / name).is_file():
        raise ValueError(f"{directory} has a config but no {name}.")
    return read_tensors(directory / name)


def save(
    model: ShadowAdapter,
    save_directory: str | Path,
    *,
    dialect: Dialect | None = None,
    include_shared_embeddings: bool = False,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    training: Mapping[str, float] | None = None,
    **_: Any,
) -> None:
    """Save an adapter; an interrupted save leaves what was there before.

    Args:
        model: the adapted model.
        save_directory: created when it is missing.
        dialect: dialect of the files; None is peft's for the variant "peft" and ours for all others.
        include_shared_embeddings: store a copy of the base's embedding table where shadow-peft 0.1.x needs one: beside an
            implicit shadow whose class does not call its table `embed_tokens`.
        is_main_process: False writes nothing, as in transformers.
        state_dict: the gathered `model.state_dict()`; required while the model is sharded.
        training: factors of the loss, to be stored in the provenance.
        **_: further arguments of transformers' `save_pretrained`; ignored.

    Raises:
        ValueError: the parameters are sharded over processes, and `state_dict` does not have all of them.
    """
    if not is_main_process:
        return
    if is_sharded(model):
        if include_shared_embeddings:
            raise ValueError("include_shared_embeddings copies the base's table, which is sharded over processes here.")
        with _gathered(model, state_dict):
            return _save(model, save_directory, dialect, training)
    _save(model, save_directory, dialect, training, include_shared_embeddings, state_dict)


def _save(
    model: ShadowAdapter,
    save_directory: str | Path,
    dialect: Dialect | None,
    training: Mapping[str, float] | None,
    include_shared_embeddings: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    if (dialect or _dialect_of(model)) == "peft":
        return _save_peft(model, save_directory, training)
    contents = {
        native.adapter_file(model.shadow_config.variant): native.adapter_views(model),
        native.HEADS_FILE: native.head_views(model),
        native.BASE_ADAPTER_FILE: peft_adapters.views(model.base_model),
    }
    if state_dict is not None:
        contents = {file: {name: state_dict[name] for name in views} for file, views in contents.items()}
    if include_shared_embeddings:
        contents[native.adapter_file(model.shadow_config.variant)] |= shared_table(model)
    with all_or_none(save_directory, replacing=FILES) as staging:
        for file, tensors in contents.items():
            if tensors:
                write_tensors(tensors, staging / file)
        write_json({**model.shadow_config.to_dict(), "provenance": provenance(model, training)}, staging / CONFIG_FILE)
        _write_index({name: file for file, tensors in contents.items() for name in tensors}, save_directory, staging)


def _gathered(model: ShadowAdapter, state_dict: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
    """A context in which the model has the unsharded parameters of a gathered state dict, to write a file."""
    missing = [name for name in own_state(model, without="base_model") if name not in (state_dict or {})]
    if state_dict is None or missing:
        raise ValueError(
            "The adapter's parameters are sharded over processes. Call accelerator.get_state_dict(model) on all of them and "
            f"pass the result as state_dict; what was passed lacks {len(missing)} of its tensors."
        )
    return parameters_replaced(
        model, {name: tensor for name, tensor in state_dict.items() if not name.startswith("base_model.")}
    )


def _save_peft(model: ShadowAdapter, save_directory: str | Path, training: Mapping[str, float] | None) -> None:
    if native.head_views(model) or peft_adapters.views(model.base_model):
        raise ValueError("peft's dialect has no place for trained heads or for adapters of the base.")
    with all_or_none(save_directory, replacing=FILES) as staging:
        adapter = peft.adapter_views(model)
        write_tensors(adapter, staging / peft.ADAPTER_FILE)
        base_name = model.base_model.name_or_path or None
        config = {**peft.peft_config(model, base_name), "provenance": provenance(model, training)}
        if training is not None:
            config[_PEFT_WEIGHT[0]] = training[_PEFT_WEIGHT[1]]
        write_json(config, staging / peft.CONFIG_FILE)
        _write_index(dict.fromkeys(adapter, peft.ADAPTER_FILE), save_directory, staging)


def _write_index(files: Mapping[str, str], save_directory: str | Path, staging: Path) -> None:
    if _TRAINER_FOLDER.fullmatch(Path(save_directory).name):
        write_json({"metadata": {}, "weight_map": dict(files)}, staging / INDEX_FILE)


def _dialect_of(model: ShadowAdapter) -> Dialect:
    return "peft" if model.shadow_config.variant == "peft" else "native"


def load_into(model: ShadowAdapter, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model; all are checked before the first is copied.

    Raises:
        ValueError: the checkpoint was made for a base of other sizes, or a tensor is missing, unknown or of another shape.
    """
    _require_same_base(model, checkpoint)
    views = peft.adapter_views(model) if checkpoint.dialect == "peft" else native.adapter_views(model)
    heads = native.head_views(model)
    known = {name: t for name, t in checkpoint.tensors.items() if name not in shared_table(model)}
    below = peft_adapters.views(model.base_model)
    if below and not checkpoint.base_adapters:
        logger.warning("The base carries PEFT adapters that %s was not made with.", checkpoint.directory)
        below = {}
    fill({**views, **heads, **below}, {**known, **checkpoint.heads, **checkpoint.base_adapters}, str(checkpoint.directory))


def _require_same_base(model: ShadowAdapter, checkpoint: Checkpoint) -> None:
    stored, here = checkpoint.provenance.get("base_sizes", {}), base_sizes(model)
    differing = [f"{name} {stored[name]} (here {here[name]})" for name in here if stored.get(name, here[name]) != here[name]]
    if differing:
        raise ValueError(f"{checkpoint.directory} was made for another base: {', '.join(differing)}.")


def shared_table(model: ShadowAdapter) -> dict[str, Tensor]:
    """The base's embedding table under the name that an embedding table of the implicit shadow would have."""
    name = model.shared_table_name
    if name is None:
        return {}
    return {f"shadow_model.{name}": model.base_model.get_input_embeddings().weight.detach()}


def provenance(model: ShadowAdapter, training: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Where an adapter comes from: versions, base, base sizes, seed and, if known, the factors of the loss."""
    base = model.base_model
    return {
        "versions": {
            **{name: version(name) for name in ("shadow-peft", "torch", "transformers", "safetensors")},
            "python": platform.python_version(),
        },
        "base_model_name_or_path": base.name_or_path or None,
        "base_model_type": base.config.model_type,
        "base_model_class": type(base).__name__,
        "base_sizes": base_sizes(model),
        "base_adapters": peft_adapters.stored_configs(base),
        "seed": torch.initial_seed(),
        "training": None if training is None else dict(training),
        "shadow_model_config": None if model.has_implicit_shadow else _plain(model.shadow_model.config.to_dict()),
        "shadow_model_has_embeddings": input_embeddings(model.shadow_model) is not None,
    }


def base_sizes(model: ShadowAdapter) -> dict[str, int]:
    """The sizes of a base that an adapter depends on."""
    table = model.base_model.get_input_embeddings()
    sizes = {"hidden_size": model.decoder.hidden_size, "num_hidden_layers": len(model.decoder.layers)}
    return sizes if table is None else {**sizes, "vocab_size": int(table.weight.shape[0])}


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return plain
