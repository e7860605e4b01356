"""Parameters that are sharded over processes: with FSDP2 they are DTensors, and every process has a part of each.

A tensor of an adapter's file is a slice of a parameter, and a slice of a shard is no view of it. So while a model is
sharded, its state dict has torch's own parameter names, as torch's distributed checkpoints need it:

    sharded     peft_model.shadow_update_model.live.down                   DTensor [M, 2k, d]
    in a file   shadow_update_model.update_gates.0.0.weight                [k, d]

The sharded tensors are gathered on one process; `parameters_replaced` puts the unsharded tensors in place of the parameters
while a file is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module are sharded over processes; also if a forward pass has left them gathered."""
    return any(isinstance(m, FSDPModule) for m in module.modules()) or any(
        isinstance(p, DTensor) for p in module.parameters()
    )


def own_state(module: nn.Module, without: str) -> dict[str, Tensor]:
    """The state of a module under its own names, without that of one child; tensors are detached and share memory.

    FSDP's hooks on `state_dict` shard again what a forward pass has left gathered.
    """
    return {
        f"{child}.{name}": tensor.detach()
        for child, part in module.named_children()
        if child != without
        for name, tensor in part.state_dict(keep_vars=True).items()
    }


def sharded_like(views: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each sharded like the view of the same name; all processes call this together.

    torch's loader passes unsharded tensors where a forward pass had left the parameter gathered.
    """
    return {name: _sharded(tensor, views.get(name)) for name, tensor in tensors.items()}


def _sharded(tensor: Tensor, view: Tensor | None) -> Tensor:
    if not isinstance(view, DTensor) or isinstance(tensor, DTensor) or tensor.shape != view.shape:
        return tensor
    return distribute_tensor(tensor.to(view.device), view.device_mesh, view.placements)


@contextmanager
def parameters_replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context, the module's parameters of these names are these tensors; no forward pass may run.

    Args:
        module: a sharded module.
        tensors: parameter name -> unsharded tensor.
    """
    shards: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for name, shard in module.named_parameters():
        if name in tensors:
            place, _, leaf = name.rpartition(".")
            shards.append((module.get_submodule(place)._parameters, leaf, shard))
            module.get_submodule(place)._parameters[leaf] = nn.Parameter(tensors[name], requires_grad=shard.requires_grad)
    try:
        yield
    finally:
        for parameters, leaf, shard in shards:
            parameters[leaf] = shard
