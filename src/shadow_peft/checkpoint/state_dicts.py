"""State dicts of a model whose names in files are not those of its parameters.

    in the state dict     shadow_update_model.update_gates.0.0.weight     [k, d]
    in the module         shadow_update_model.live.down                   [M, 2k, d]

What `state_dict()` returns has the names of the files, tensor by tensor with memory of its own, so that every tool that
writes state dicts can write it. Loading accepts it from any module around the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shadow_peft.storage.sharded import is_sharded, sharded_like
from shadow_peft.storage.tensors import fill

_WRAPPERS = ("module.", "_orig_mod.", "peft_model.")
"""What wrappers and parent modules put before the names of a state dict."""


def with_own_memory(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as entries of a state dict: contiguous, and none shares its memory with another.

    A view of a whole parameter stays that view; slices of stacked weights are copied, and so are shared tensors after the
    first.
    """
    taken: set[int] = set()
    entries = {}
    for name, view in views.items():
        if type(view) is Tensor and view.device.type != "meta":
            storage = view.untyped_storage()
            is_whole = view.is_contiguous() and storage.nbytes() == view.numel() * view.element_size()
            if not is_whole or storage.data_ptr() in taken:
                view = view.clone(memory_format=torch.contiguous_format)
            taken.add(storage.data_ptr())
        entries[name] = view
    return entries


def own_entries(
    state_dict: Mapping[str, Tensor], known: Mapping[str, Tensor], module: nn.Module | None = None
) -> dict[str, Tensor]:
    """The entries without the prefixes of wrappers and without the base's own parameters.

    Args:
        state_dict: of the model with `known` names, or of a wrapper around it.
        known: the model's names in files.
        module: the model; torch's distributed loading adds its parameters themselves, which any other entry comes before.
    """
    held = set() if module is None else {id(p) for p in module.parameters()}
    ours = {_unwrapped(name, known): tensor for name, tensor in state_dict.items() if id(tensor) in held}
    given = {_unwrapped(name, known): tensor for name, tensor in state_dict.items() if id(tensor) not in held}
    entries = {name: tensor for name, tensor in ours.items() if name in known} | given
    return {name: tensor for name, tensor in entries.items() if name in known or not name.startswith("base_model.")}


def _unwrapped(name: str, known: Mapping[str, Tensor]) -> str:
    while name not in known:
        prefix = next((p for p in _WRAPPERS if name.startswith(p)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name


def load_nested(
    module: nn.Module,
    views: Mapping[str, Tensor],
    state_dict: dict[str, Any],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Copy the part of a parent's state dict that is this module's, and leave torch's own loading nothing to do in it.

    Args:
        module: the module that torch is about to load.
        views: name in files -> destination.
        state_dict: of the parent; changed in place.
        prefix: what the parent puts before the module's names.
        missing, unexpected: names are added here, which torch refuses if the parent is loaded strictly.
        errors: problems are added here, which torch raises in any case.
    """
    entries = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    own = own_entries({name[len(prefix) :]: tensor for name, tensor in entries.items()}, views, module)
    missing += [prefix + name for name in views if name not in own]
    unexpected += [prefix + name for name in own if name not in views]
    own = {name: tensor for name, tensor in own.items() if name in views}
    try:
        fill(views, sharded_like(views, own) if is_sharded(module) else own, f"The state dict at {prefix!r}", strict=False)
    except ValueError as error:
        errors.append(str(error))
    held = {
        name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    }
    for child, part in module.named_children():
        for name, tensor in part.state_dict(prefix=f"{child}.", keep_vars=True).items():
            if name in held or name.endswith("_extra_state"):
                state_dict[prefix + name] = tensor  # itself, so that nothing is copied
