"""Saves an adapter into a directory and reads it from a directory or the hub, in either file dialect."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.implicit import backbone_with_table
from shadow_peft.base import peft_adapters
from shadow_peft.base.decoder import find_decoder
from shadow_peft.base.task_head import path_of
from shadow_peft.checkpoint import native, peft
from shadow_peft.checkpoint.arguments import check_arguments
from shadow_peft.checkpoint.folder import FILES, INDEX_FILE, STATE_FILE, check_target, is_trainer_folder
from shadow_peft.checkpoint.provenance import base_sizes, malformed, provenance, stored_label_tokens, stored_provenance
from shadow_peft.checkpoint.state_dicts import own_entries
from shadow_peft.config import CONFIG_FILE, ShadowConfig
from shadow_peft.storage.atomic import all_or_none, read_unchanged
from shadow_peft.storage.files import read_json, write_json
from shadow_peft.storage.hub import local_directory
from shadow_peft.storage.sharded import is_sharded, own_state, parameters_replaced
from shadow_peft.storage.tensors import fill, read_tensors, write_tensors

logger = logging.getLogger(__name__)

Dialect = Literal["native", "peft"]

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
            logger.info("%s also holds %s; load it with a task model to get them.", self.directory, heads)
        return replace(self, heads={}, config=replace(self.config, modules_to_save=[]))


# -------------------------------------------------------------------- reading


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
        training = {_PEFT_WEIGHT[1]: float(data.get(_PEFT_WEIGHT[0], 0.05)), **origin.get("training", {})}
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


# -------------------------------------------------------------------- saving


def save(
    model: ShadowAdapter,
    save_directory: str | Path,
    *,
    dialect: Dialect | None = None,
    include_shared_embeddings: bool = False,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    training: Mapping[str, float] | None = None,
    overwrite: bool = False,
    **others: Any,
) -> None:
    """Save an adapter; an interrupted save leaves what was there before, see `storage.atomic`.

    Args:
        model: the adapted model.
        save_directory: created when it is missing.
        dialect: dialect of the files; None is peft's for the variant "peft" and ours for all others.
        include_shared_embeddings: store a copy of the base's embedding table where shadow-peft 0.1.x needs one: beside an
            implicit shadow whose class does not call its table `embed_tokens`.
        is_main_process: False writes nothing, as in transformers.
        state_dict: what `model.state_dict()` returned, when a trainer has gathered it; needed where it is sharded.
        training: factors of the loss, to be stored with where the adapter comes from.
        overwrite: save even if the folder holds a model or an adapter of another kind; files of the same name are replaced.
        **others: what trainers pass to any model, see `checkpoint.arguments`.

    Raises:
        ValueError: the folder holds something else, or the parameters are sharded over processes and `state_dict` does not
            hold them whole.
        TypeError: an unknown argument.
    """
    check_arguments(others)
    if not is_main_process:
        return
    if is_sharded(model):
        if include_shared_embeddings:
            raise ValueError("include_shared_embeddings copies the base's table, which is sharded over processes here.")
        with _gathered(model, state_dict):
            return _write(model, Path(save_directory), _contents(model, dialect), training, overwrite)
    contents = _contents(model, dialect)
    if state_dict is not None:
        contents = _taken_from(state_dict, contents)
    if include_shared_embeddings and peft.ADAPTER_FILE not in contents:
        contents[native.adapter_file(model.shadow_config.variant)] |= shared_table(model)
    _write(model, Path(save_directory), contents, training, overwrite)


def check_save(
    model: ShadowAdapter,
    save_directory: str | Path,
    *,
    dialect: Dialect | None = None,
    overwrite: bool = False,
    **others: Any,
) -> None:
    """Check a folder as `save` does before it writes, where several adapters are to be saved; the arguments are the same.

    Raises:
        ValueError: the folder holds something else.
    """
    names = [file for file, tensors in _contents(model, dialect).items() if tensors]
    check_target(Path(save_directory), [*names, peft.CONFIG_FILE if peft.ADAPTER_FILE in names else CONFIG_FILE], overwrite)


def _contents(model: ShadowAdapter, dialect: Dialect | None) -> dict[str, dict[str, Tensor]]:
    """File -> name -> tensor of the model."""
    if (dialect or _dialect_of(model)) == "peft":
        contents = {peft.ADAPTER_FILE: peft.adapter_views(model)}
    else:
        contents = {native.adapter_file(model.shadow_config.variant): native.adapter_views(model)}
    heads, base = native.head_views(model), peft_adapters.views(model.base_model)
    return {**contents, native.HEADS_FILE: heads, native.BASE_ADAPTER_FILE: base}


def _taken_from(state_dict: Mapping[str, Tensor], contents: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The same files with the tensors of a state dict."""
    known = {name: tensor for tensors in contents.values() for name, tensor in tensors.items()}
    given = own_entries(state_dict, known)
    missing = [name for name in known if name not in given]
    if missing:
        raise ValueError(f"state_dict lacks {len(missing)} tensors of the adapter; {missing[0]} is the first.")
    return {file: {name: given[name] for name in tensors} for file, tensors in contents.items()}


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


def _write(
    model: ShadowAdapter,
    directory: Path,
    contents: dict[str, dict[str, Tensor]],
    training: Mapping[str, float] | None,
    overwrite: bool,
) -> None:
    contents = {file: tensors for file, tensors in contents.items() if tensors}
    config_file = peft.CONFIG_FILE if peft.ADAPTER_FILE in contents else CONFIG_FILE
    extra = _trainer_file(directory, config_file)
    old = check_target(directory, [*contents, config_file, *extra], overwrite)
    origin = {**provenance(model, training, list(contents)), "trainer_files": extra}
    with all_or_none(directory, removing=old) as staging:
        for file, tensors in contents.items():
            write_tensors(tensors, staging / file)
        write_json(_config(model, config_file, origin, training), staging / config_file)
        if extra == [INDEX_FILE]:
            files = {name: file for file, tensors in contents.items() for name in tensors}
            write_json({"metadata": {}, "weight_map": files}, staging / INDEX_FILE)
        elif extra == [STATE_FILE]:
            write_tensors({n: t for tensors in contents.values() for n, t in tensors.items()}, staging / STATE_FILE)


def _trainer_file(directory: Path, config_file: str) -> list[str]:
    """What a `Trainer` needs to load the adapter back into its model; only the folders that it resumes from get it.

    Beside `adapter_model.safetensors` it takes no index: it expects a PeftModel, or all tensors in one file.
    """
    if not is_trainer_folder(directory):
        return []
    return [STATE_FILE if config_file == peft.CONFIG_FILE else INDEX_FILE]


def _config(
    model: ShadowAdapter, config_file: str, origin: dict[str, Any], training: Mapping[str, float] | None
) -> dict[str, Any]:
    """The content of the config file."""
    config = model.shadow_config.to_dict()
    if config_file == CONFIG_FILE:
        return {**config, "provenance": origin}
    theirs = peft.peft_config(model, model.base_model.name_or_path or None)
    if training is not None:
        theirs[_PEFT_WEIGHT[0]] = training[_PEFT_WEIGHT[1]]
    return {**theirs, "provenance": {**origin, "shadow_config": config}}


def _dialect_of(model: ShadowAdapter) -> Dialect:
    return "peft" if model.shadow_config.variant == "peft" else "native"


# -------------------------------------------------------------------- loading


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
    model.label_tokens = stored_label_tokens(checkpoint.provenance)


def mirror_with_table(base: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel | None:
    """The backbone of an adapter of peft's that reads a table of its own, though it is as wide as the base; else None."""
    config = checkpoint.config
    if checkpoint.dialect != "peft" or not config.train_shadow_embeddings:
        return None
    decoder = find_decoder(base)
    same_width = config.shadow_hidden_size in (None, decoder.hidden_size)
    table = path_of(decoder.backbone, decoder.backbone.get_input_embeddings())
    if not same_width or not peft.holds(checkpoint.tensors, f"{table}.weight"):
        return None
    return backbone_with_table(decoder, config)


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
