"""The implicit shadow backbone: a short copy of the base's decoder, random or initialised from the base's own layers.

It has the base's backbone class and config with fewer layers (see `truncated_config`). It keeps no embedding table: it is
fed the base's input embeddings, or reads the base's table where its layers need the token ids (see `shared_embedding`).
Initialised from the base, layer i starts as base layer `selected[i]`; where the backbone is narrower, it keeps the MLP
neurons and attention heads of largest weight norm (see `pruning`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadow_peft.backbone.dequantize import CannotInitFromBase, dequantized_view
from shadow_peft.backbone.explicit import remove_embeddings
from shadow_peft.backbone.pruning import WeightSlice, block_rows, select_slices
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.backbone.truncated_config import selected_layers, truncated_config
from shadow_peft.base.architectures import WITHOUT_GRADIENT, architecture_of, read_size
from shadow_peft.base.decoder import Decoder
from shadow_peft.base.task_head import path_of
from shadow_peft.config import ShadowConfig

logger = logging.getLogger(__name__)


def build_implicit_backbone(
    decoder: Decoder, config: ShadowConfig, init_from_base: bool = True
) -> tuple[PreTrainedModel, str | None]:
    """The implicit shadow backbone of a base, in its `master_dtype` on the CPU.

    Args:
        decoder: the base's decoder.
        config: depth and width of the backbone, and how it is initialised.
        init_from_base: False leaves the weights random whatever the config says, for a checkpoint that is about to be
            loaded.

    Returns:
        The backbone, and the name that the weight of its embedding table had before it was removed; None if it keeps a table
        of its own, because it is of another width.

    Raises:
        ValueError: more layers than the base has, a size the base's config does not know, or `shadow_init="base"`
            where the sizes do not allow it.
    """
    backbone = backbone_with_table(decoder, config)
    shared_name = _share_tables(backbone, decoder, config)
    if init_from_base and config.shadow_init != "random":
        _init_from_base(backbone, decoder, config)
    if shared_name is None and config.shadow_hidden_size not in (None, decoder.hidden_size):
        return backbone, None
    return backbone, shared_name or remove_embeddings(backbone)


def backbone_with_table(decoder: Decoder, config: ShadowConfig) -> PreTrainedModel:
    """A random backbone as `build_implicit_backbone` makes it, but with the embedding table of its class."""
    backbone: PreTrainedModel = type(decoder.backbone)(truncated_config(decoder, config))
    _remove_unused_modules(backbone, decoder)
    _freeze_without_gradient(backbone)
    return backbone.to(master_dtype(decoder.backbone.dtype))


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parameters are trained beside a base of a dtype: float32, unless the base computes in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _remove_unused_modules(backbone: PreTrainedModel, decoder: Decoder) -> None:
    """Remove what does not read text, and optional parts that this base was built without, such as BERT's pooler."""
    not_text = architecture_of(decoder.config).non_text_modules
    for name in list(backbone._modules):
        if name in not_text or getattr(decoder.backbone, name) is None:
            backbone._modules[name] = None


def _freeze_without_gradient(backbone: PreTrainedModel) -> None:
    """What no gradient reaches stays in the file, and out of the trainable set."""
    for path, module in backbone.named_modules():
        if path.rpartition(".")[2] in WITHOUT_GRADIENT:
            module.requires_grad_(False)


def _share_tables(backbone: PreTrainedModel, decoder: Decoder, config: ShadowConfig) -> str | None:
    """Let a backbone that must be given token ids read the base's tables.

    Returns:
        The name that the weight of its embedding table had; None if it needs no ids, or keeps tables of its own width.
    """
    architecture = architecture_of(decoder.config)
    if not architecture.needs_token_ids or config.shadow_hidden_size not in (None, decoder.hidden_size):
        return None
    for name in _existing(architecture.token_tables, decoder):
        table = decoder.backbone.get_submodule(name)
        backbone._modules[name] = SharedEmbedding(table, _layer_blocks(decoder, config, table.weight.shape[1]))
    path = path_of(backbone, backbone.get_input_embeddings())
    backbone.set_input_embeddings(SharedEmbedding(decoder.backbone.get_input_embeddings()))
    return f"{path}.weight"


def _existing(names: tuple[str, ...], decoder: Decoder) -> list[str]:
    return [name for name in names if name in decoder.backbone._modules]


def _layer_blocks(decoder: Decoder, config: ShadowConfig, size: int) -> Tensor:
    """Indices of the selected layers' parts among `size` entries that hold a part for every layer of the base."""
    return block_rows(torch.tensor(selected_layers(decoder, config)), size // len(decoder.layers))


def _init_from_base(backbone: PreTrainedModel, decoder: Decoder, config: ShadowConfig) -> None:
    """Initialise from the base; where that cannot be, raise or, if the config leaves the choice, stay random."""
    try:
        _copy_from_base(backbone, decoder, config)
    except CannotInitFromBase as reason:
        if config.shadow_init == "base":
            raise
        logger.info("The shadow backbone starts at random: %s", reason)


@torch.no_grad()
def _copy_from_base(backbone: PreTrainedModel, decoder: Decoder, config: ShadowConfig) -> None:
    """Copy every parameter and saved buffer from the base; all are found before the first is written."""
    _require_same_heads(backbone.config, decoder.config, config)
    copies: list[tuple[Tensor, Tensor]] = []
    head_dim = getattr(decoder.config, "head_dim", None) if _prunes_heads(config) else None
    for index, layer in enumerate(backbone.get_submodule(decoder.layers_path).children()):
        source = decoder.layers[selected_layers(decoder, config)[index]]
        with materialized(source):
            plain = dequantized_view(source)
            copies += _pairs(layer, plain, select_slices(layer, plain, head_dim))
    inside, rows = f"{decoder.layers_path}.", _layer_rows(decoder, config)
    for path, module in backbone.named_modules():
        if not path.startswith(inside) and module is not backbone.get_input_embeddings():
            source = _counterpart(decoder.backbone, path)
            with materialized(source):
                copies += _own_pairs(module, source, path, rows)
    if any(value.is_meta for _, value in copies):
        backbone.to("meta")  # a base of sizes without numbers gets a shadow of the same kind
        return
    for target, value in copies:
        target.copy_(value)


def _prunes_heads(config: ShadowConfig) -> bool:
    return config.shadow_num_attention_heads is not None or config.shadow_num_key_value_heads is not None


def _layer_rows(decoder: Decoder, config: ShadowConfig) -> dict[str, WeightSlice]:
    """Slices of the linear layers beside the layers that hold a part for every layer."""
    names = _existing(architecture_of(decoder.config).layer_rows, decoder)
    weights = {name: decoder.backbone.get_submodule(name).weight for name in names}
    return {name: WeightSlice(rows=_layer_blocks(decoder, config, w.shape[0])) for name, w in weights.items()}


def _require_same_heads(short: PreTrainedConfig, base: PreTrainedConfig, config: ShadowConfig) -> None:
    """Whole heads can be pruned, not reshaped: the width of a head must be declared and stay."""
    heads = config.shadow_num_attention_heads
    if heads is None or heads == read_size(base, "num_attention_heads"):
        return
    if getattr(short, "head_dim", None) is None or short.head_dim != getattr(base, "head_dim", None):
        raise CannotInitFromBase("another number of heads changes the width of a head")


def _pairs(layer: nn.Module, source: nn.Module, slices: dict[str, WeightSlice]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for path, module in layer.named_modules():
        pairs += _own_pairs(module, _counterpart(source, path), path, slices)
    return pairs


def _counterpart(source: nn.Module, path: str) -> nn.Module:
    try:
        return source.get_submodule(path)
    except AttributeError:
        raise CannotInitFromBase(f"the base has no module {path!r} there") from None


def _own_pairs(
    module: nn.Module, source: nn.Module, path: str, slices: dict[str, WeightSlice]
) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the backbone, value from the base) for the parameters and saved buffers of `module` itself."""
    values, pairs = own_tensors(source), []
    for name, target in own_tensors(module).items():
        value = values.get(name)
        if value is not None and value.shape != target.shape and path in slices:
            value = slices[path].of(value)
        if value is None and name.endswith("bias"):
            value = torch.zeros_like(target)  # a bias that the base does without
        if value is None or value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
            raise CannotInitFromBase(f"no tensor of shape {tuple(target.shape)} in the base for {path}.{name}")
        pairs.append((target, value.detach().clone()))
    return pairs


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of a module itself, without its children's, by name."""
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=False)), **buffers}


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Hold a module's weights in memory for a while, where accelerate has offloaded them."""
    with ExitStack() as stack:
        for part in module.modules():
            if "_hf_hook" in part.__dict__:
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield
