"""The implicit shadow backbone: a short twin of the base, random or cut from the base's own pretrained layers.

The twin has the base's backbone class and config with fewer layers. It keeps no embedding table: it is fed the base's input
embeddings. Cut from the base, layer i of the twin starts as base layer `chosen[i]`; where the twin is narrower, it keeps
the MLP neurons and attention heads that weigh most, measured by the norms of their weights (see `narrowing`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadow_peft.config import ShadowConfig
from shadow_peft.heads import input_embeddings, path_of
from shadow_peft.layouts import Stack, read_size, write_size
from shadow_peft.narrowing import Kept, kept_parts

logger = logging.getLogger(__name__)

_SIZES = {
    "hidden_size": "shadow_hidden_size",
    "intermediate_size": "shadow_intermediate_size",
    "num_attention_heads": "shadow_num_attention_heads",
    "num_key_value_heads": "shadow_num_key_value_heads",
    "head_dim": "shadow_head_dim",
}
"""A size of the backbone's config -> the field of ShadowConfig that overrides it."""


class CannotCut(ValueError):
    """The twin's sizes do not let it start from the base's layers."""


def build_twin(stack: Stack, config: ShadowConfig, cut: bool = True) -> tuple[PreTrainedModel, str | None]:
    """The implicit shadow backbone of a base, in float32 on the CPU.

    Args:
        stack: the base's decoder.
        config: how long and how wide the twin is, and where it starts.
        cut: False leaves the weights random whatever the config says, for a checkpoint that is about to be loaded.

    Returns:
        The backbone, and the name that the weight of its embedding table had before it was dropped.

    Raises:
        ValueError: more layers than the base has, a size the base's config does not know, or `shadow_init="base"`
            where the sizes do not allow it.
    """
    twin_config = shortened_config(stack, config)
    twin: PreTrainedModel = type(stack.backbone)(twin_config).to(torch.float32)
    if cut and config.shadow_init != "random":
        _start_from_base(twin, stack, config)
    return twin, drop_embeddings(twin)


def chosen_layers(count: int, config: ShadowConfig) -> list[int]:
    """Base layers that the twin's layers follow: the first ones, or ones evenly spaced from the first to the last."""
    n = config.num_shadow_layers
    if n > count:
        raise ValueError(f"num_shadow_layers is {n}, but the base has only {count} decoder layers.")
    if config.shadow_init_layers == "first" or n == 1:
        return list(range(n))
    return [round(i * (count - 1) / (n - 1)) for i in range(n)]


def shortened_config(stack: Stack, config: ShadowConfig) -> PreTrainedConfig:
    """The base's config with the twin's layers: sizes overridden, per-layer lists cut to the chosen layers."""
    short = copy.deepcopy(stack.config)
    chosen = chosen_layers(len(stack.layers), config)
    for name, value in stack.config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == len(stack.layers):
            setattr(short, name, [value[i] for i in chosen])
    write_size(short, "num_hidden_layers", len(chosen))
    for size, field in _SIZES.items():
        value = getattr(config, field)
        if value is not None:
            write_size(short, size, value)
    return short


def drop_embeddings(backbone: PreTrainedModel) -> str | None:
    """Take a backbone's input embedding table away; it must be fed `inputs_embeds` from then on.

    Returns:
        The name that the table's weight had, or None if there was none.
    """
    table = input_embeddings(backbone)
    if table is None:
        return None
    path = path_of(backbone, table)
    parent, _, name = path.rpartition(".")
    backbone.get_submodule(parent)._modules[name] = None
    return f"{path}.weight"


def _start_from_base(twin: PreTrainedModel, stack: Stack, config: ShadowConfig) -> None:
    """Cut the twin from the base; where that cannot be, raise or, if the config leaves the choice, keep it random."""
    try:
        _cut(twin, stack, config)
    except CannotCut as reason:
        if config.shadow_init == "base":
            raise
        logger.info("The shadow backbone starts at random: %s", reason)


@torch.no_grad()
def _cut(twin: PreTrainedModel, stack: Stack, config: ShadowConfig) -> None:
    """Copy every parameter and saved buffer of the twin from the base; all are found before the first is written."""
    _require_same_heads(twin.config, stack.config)
    copies: list[tuple[Tensor, Tensor]] = []
    for index, layer in enumerate(twin.get_submodule(stack.layers_path).children()):
        source = stack.layers[chosen_layers(len(stack.layers), config)[index]]
        with present(source):
            copies += _pairs(layer, source, kept_parts(layer, source, getattr(stack.config, "head_dim", None)))
    inside = f"{stack.layers_path}."
    for path, module in twin.named_modules():
        if not path.startswith(inside) and module is not twin.get_input_embeddings():
            source = _counterpart(stack.backbone, path)
            with present(source):
                copies += _own_pairs(module, source, path, {})
    for target, value in copies:
        target.copy_(value)


def _require_same_heads(twin: PreTrainedConfig, base: PreTrainedConfig) -> None:
    """Heads can be dropped whole, not reshaped: the width of a head must be declared and stay."""
    if read_size(twin, "num_attention_heads") == read_size(base, "num_attention_heads"):
        return
    if getattr(twin, "head_dim", None) is None or twin.head_dim != getattr(base, "head_dim", None):
        raise CannotCut("another number of heads changes the width of a head")


def _pairs(layer: nn.Module, source: nn.Module, kept: dict[str, Kept]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for path, module in layer.named_modules():
        pairs += _own_pairs(module, _counterpart(source, path), path, kept)
    return pairs


def _counterpart(source: nn.Module, path: str) -> nn.Module:
    try:
        return source.get_submodule(path)
    except AttributeError:
        raise CannotCut(f"the base has no module {path!r} there") from None


def _own_pairs(
    module: nn.Module, source: nn.Module, path: str, kept: dict[str, Kept]
) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the twin, value from the base) for the parameters and saved buffers that stand in `module` itself."""
    values, pairs = own_tensors(source), []
    for name, target in own_tensors(module).items():
        value = values.get(name)
        if value is not None and value.shape != target.shape and path in kept:
            value = kept[path].of(value)
        if value is None or value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
            raise CannotCut(f"no tensor of shape {tuple(target.shape)} in the base for {path}.{name}")
        pairs.append((target, value.detach().clone()))
    return pairs


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers that stand in a module itself, by name."""
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=False)), **buffers}


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Hold a module's weights in memory for a while, where accelerate has offloaded them."""
    with ExitStack() as stack:
        for part in module.modules():
            if "_hf_hook" in part.__dict__:
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield
