"""Saves an adapter into a directory, in either file dialect, and loads a stored one into a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.implicit import backbone_with_table
from shadow_peft.base import peft_adapters
from shadow_peft.base.decoder import find_decoder
from shadow_peft.base.task_head import path_of
from shadow_peft.checkpoint import native, peft
from shadow_peft.checkpoint.arguments import check_arguments
from shadow_peft.checkpoint.folder import INDEX_FILE, STATE_FILE, check_target, is_trainer_folder
from shadow_peft.checkpoint.provenance import base_sizes, provenance, stored_label_tokens
from shadow_peft.checkpoint.reading import PEFT_WEIGHT, Checkpoint, Dialect
from shadow_peft.checkpoint.state_dicts import own_entries
from shadow_peft.config import CONFIG_FILE
from shadow_peft.storage.atomic import all_or_none
from shadow_peft.storage.files import write_json
from shadow_peft.storage.sharded import is_sharded, own_state, parameters_replaced
from shadow_peft.storage.tensors import fill, write_tensors

logger = logging.getLogger(__name__)


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
        theirs[PEFT_WEIGHT[0]] = training[PEFT_WEIGHT[1]]
    return {**theirs, "provenance": {**origin, "shadow_config": config}}


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
