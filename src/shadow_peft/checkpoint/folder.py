"""What a folder holds besides: which files a save may replace or remove, and what it must not be mixed with.

A file is ours if its name is one that a save writes and its content says so too. A folder is written into if it is new,
holds an adapter of ours, or holds no model and no adapter of others; a tokenizer, a README and a trainer's state may be
there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from shadow_peft.base import peft_adapters
from shadow_peft.checkpoint import native, peft
from shadow_peft.config import CONFIG_FILE
from shadow_peft.storage.atomic import visible_files
from shadow_peft.storage.files import read_json
from shadow_peft.storage.tensors import tensor_names

_ADAPTERS = frozenset({native.ADAPTER_FILE, native.READOUT_FILE, native.LEGACY_ADAPTER_FILE})
_SHADOW_FILES = _ADAPTERS | {native.HEADS_FILE}
_PEFT_FILES = frozenset({peft.ADAPTER_FILE, peft.CONFIG_FILE})

FILES = _SHADOW_FILES | _PEFT_FILES | {CONFIG_FILE, native.BASE_ADAPTER_FILE}
"""All names that an adapter's files can have; a save leaves none of an earlier one."""

FILES_OF_NO_OTHERS = FILES - _PEFT_FILES
"""Those that are ours by their name alone, where the content is not looked at."""

INDEX_FILE, STATE_FILE = "model.safetensors.index.json", "model.safetensors"
"""What a `Trainer` looks for in a folder that it resumes from: an index of its files, or one file with all tensors."""

_TRAINER_FOLDER = re.compile(r"(last-)?checkpoint(-\d+)?")

_SIGNS = ("shadow_injection_model.injection_downs", "shadow_down.default.weight")
"""Ends of the names of tensors that every shadow adapter has, and nothing else."""

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_STATE = re.compile(r"(training_args|optimizer|scheduler|sampler|dl_state_dict|pytorch_model_fsdp)(_\d+)?\.bin")
"""Files that trainers and accelerate keep beside a model."""


def is_trainer_folder(directory: Path) -> bool:
    """Whether a `Trainer` may resume from a folder, by the name that it gave it."""
    return _TRAINER_FOLDER.fullmatch(directory.name) is not None


def check_target(directory: Path, names: Collection[str], overwrite: bool) -> set[str]:
    """Refuse a folder that a save would harm or mix with something else.

    Args:
        directory: where to save.
        names: of the files to be written.
        overwrite: write in any case.

    Returns:
        Names of the files of an earlier save.

    Raises:
        ValueError: saying what is there and what to do.
    """
    if not directory.is_dir():
        return set()
    files = visible_files(directory)
    own = own_files(files)
    replaced = sorted((set(names) & files.keys()) - own)
    there = others_in(directory) or (_described(replaced, files) if replaced else None)
    if there and not overwrite:
        then = f"{_listed(replaced)} would be replaced, all other files stay" if replaced else "all files stay"
        raise ValueError(
            f"Cannot save into {directory}: it holds {there}, not a shadow adapter. Choose another folder, or pass "
            f"overwrite=True to write there nevertheless ({then})."
        )
    return own


def others_in(directory: Path, but: Collection[str] = ()) -> str | None:
    """What model or adapter of others a folder holds, in words; None where there is none, or an adapter of ours too.

    Args:
        directory: the folder.
        but: names of files that do not count, since they will be removed.
    """
    files = {name: path for name, path in visible_files(directory).items() if name not in but}
    own = own_files(files)
    others = [] if _holds_adapter(own) else _others(files, own)
    return _described(others, files) if others else None


def own_files(files: Mapping[str, Path]) -> set[str]:
    """Names of the files that an earlier save has written."""
    ours, theirs = _json(files, CONFIG_FILE), _json(files, peft.CONFIG_FILE)
    own = {name for name in _SHADOW_FILES & files.keys() if _is_shadow_state(files[name])}
    if "injection_hidden_size" in ours:
        own |= {CONFIG_FILE} | _listed_files(ours, "files", _SHADOW_FILES)  # 0.1.x lists none
    if theirs.get("peft_type") == peft.PEFT_TYPE:
        own |= _PEFT_FILES | _listed_files(theirs, "files")
    if STATE_FILE in _listed_files(ours, "trainer_files") | _listed_files(theirs, "trainer_files"):
        own |= {STATE_FILE} if _is_shadow_state(files.get(STATE_FILE)) else set()
    if _is_base_adapter(files.get(native.BASE_ADAPTER_FILE)):
        own.add(native.BASE_ADAPTER_FILE)
    if _is_index(_json(files, INDEX_FILE)):
        own.add(INDEX_FILE)
    return own & files.keys() & (FILES | {INDEX_FILE, STATE_FILE})


def _listed_files(stored: Mapping[str, Any], field: str, otherwise: Collection[str] = ()) -> set[str]:
    """The files that a stored config says were saved with it."""
    origin = stored.get("provenance")
    listed = origin.get(field) if isinstance(origin, dict) else None
    return {name for name in (listed if isinstance(listed, list) else otherwise) if isinstance(name, str)} - _PEFT_FILES


def _holds_adapter(own: Collection[str]) -> bool:
    return {peft.CONFIG_FILE, peft.ADAPTER_FILE} <= set(own) or (CONFIG_FILE in own and bool(_ADAPTERS & set(own)))


def _others(files: Mapping[str, Path], own: Collection[str]) -> list[str]:
    """Names of the files that belong to a model or an adapter of others."""
    return sorted(
        name
        for name, path in files.items()
        if name not in own
        and (name == peft.CONFIG_FILE or (name.endswith(_WEIGHTS) and not _STATE.fullmatch(name)))
        and not _is_shadow_state(path)
    )


def _described(names: list[str], files: Mapping[str, Path]) -> str:
    if peft.CONFIG_FILE in names:
        return f"an adapter with peft_type {_json(files, peft.CONFIG_FILE).get('peft_type')!r} ({_listed(names)})"
    if any(name.endswith(_WEIGHTS) for name in names):
        return f"a model ({_listed([name for name in ('config.json',) if name in files] + names)})"
    return f"a file of another program ({_listed(names)})"


def _listed(names: Iterable[str]) -> str:
    first, rest = list(names)[:3], list(names)[3:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def _json(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    try:
        return read_json(files[name])
    except (KeyError, ValueError, OSError):
        return {}


def _is_index(data: Mapping[str, Any]) -> bool:
    named = data.get("weight_map")
    return isinstance(named, dict) and bool(named) and all(isinstance(f, str) and f in FILES for f in named.values())


def _is_shadow_state(path: Path | None) -> bool:
    """Whether a safetensors file holds the tensors of a shadow adapter, under whatever name a wrapper gave them."""
    if path is None or path.suffix != ".safetensors":
        return False
    return any(name.endswith(_SIGNS) for name in tensor_names(path))


def _is_base_adapter(path: Path | None) -> bool:
    names = [] if path is None else tensor_names(path)
    return bool(names) and all(name.startswith(peft_adapters.PREFIX) for name in names)
