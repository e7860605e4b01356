"""Where a base keeps its decoder layers, and what its config calls its sizes.

A generic rule finds the layers of almost every architecture: the one list of modules, inside a model of the decoder's own
type, whose length is the number of decoder layers that the config declares. `LAYERS` names the place where that rule does
not hold. What cannot be ridden at all stands in `UNSUPPORTED` with its reason. The other tables declare, by `model_type`,
what is unusual about a decoder; what they do not name is as in Llama.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

MIN_LAYERS = 2

LAYERS: dict[str, str] = {}
"""`model_type` -> path of the decoder layers inside the backbone, where the generic rule is not enough."""

_DRAFTER = "it is a drafter whose layers read the keys and values of another model"
_CODEBOOKS = "it predicts several audio codebooks at every step, each with a head of its own"

UNSUPPORTED: dict[str, str] = {
    "blt": "it has no one stack: bytes, patches and bytes again run through three stacks with cross attention between them",
    "cpmant": "it is not causal, and its forward takes no embeddings",
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "hrm_text": "its two stacks of layers take turns several times on every token, so a layer has no one place in depth",
    "musicgen_decoder": _CODEBOOKS,
    "musicgen_melody_decoder": _CODEBOOKS,
    "prophetnet": "its decoder is not causal: its n-gram streams, which its layers carry beside the main stream, look ahead",
    "reformer": "its layers are reversible: each takes and returns two streams, which its own backward pass restores",
    "rwkv": "its initialisation divides by the number of layers less one, so there is no twin of one layer",
    "xlm": "it has no decoder layers: its attentions, feed-forward parts and norms stand in lists of their own",
    "xlnet": "it is not causal",
}
"""`model_type` -> why its decoder cannot be ridden."""

INPUT_NAMES: dict[str, str] = {}
"""`model_type` -> keyword of the hidden state in a call of a decoder layer, where it is not `hidden_states`."""

DEPTH_NAMES = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers", "n_layer", "n_layers")
"""Names of the number of decoder layers; `num_hidden_layers` is the encoder's in BART's family, twice the own in LongCat."""

SIZE_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_inner"),
    "num_attention_heads": ("num_attention_heads", "decoder_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "num_hidden_layers": DEPTH_NAMES,
}
"""Our name of a size -> the names that configs use for it, in order of preference."""

COUNTS_FROM_PADDING = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
"""Types whose first token has the position `pad_token_id + 1`."""

TOKEN_TABLES: dict[str, tuple[str, ...]] = {
    "deepseek_v4": (),
    "gemma3n_text": ("embed_tokens_per_layer",),
    "gemma4_text": ("embed_tokens_per_layer",),
}
"""Types whose backbone must be given token ids -> tables in it, where it has them, that hold, side by side, a part of each
token for every layer."""

LAYER_ROWS: dict[str, tuple[str, ...]] = {
    "gemma3n_text": ("per_layer_model_projection",),
    "gemma4_text": ("per_layer_model_projection",),
}
"""Linear maps of a backbone, where it has them, whose rows hold, one below the other, a part for every layer."""

NOT_TEXT: dict[str, tuple[str, ...]] = {
    "git": ("image_encoder", "visual_projection"),
    "phi4_multimodal": ("embed_tokens_extend",),
}
"""Parts of a backbone that read something else than text; a twin is without them."""

READ_BY_HEAD: dict[str, str] = {"opt": "model.decoder"}
"""`model_type` -> the model inside its causal LM that the class calls, where that is not the outermost one that takes
embeddings."""


ADDS_IN_PLACE = frozenset({"falcon", "gemma3n_text", "roc_bert"})
"""Types that change what a linear map gave in place, so that it can't be kept for the backward pass."""

FEWEST_EXPORTED: dict[str, tuple[int, str]] = {
    "olmo_hybrid": (2, "its config wants a recurrent and an attention layer"),
}
"""Types whose config, when it is loaded, refuses a model of fewer layers, and why."""


class MlpNames(NamedTuple):
    """Names of the linear maps of an MLP."""

    gate: str
    up: str
    down: str


class AttentionNames(NamedTuple):
    """Names of the linear maps of an attention."""

    query: str
    key: str
    value: str
    output: str


MLP = MlpNames("gate_proj", "up_proj", "down_proj")
ATTENTION = AttentionNames("q_proj", "k_proj", "v_proj", "o_proj")
"""The maps that a narrower twin can be cut from; layers that name them otherwise can be cut at full width only."""


WITHOUT_GRADIENT = (
    # what reads an encoder, which a decoder has not
    *("encoder_attn", "encoder_attn_layer_norm", "crossattention", "ln_cross_attn"),
    "indexer",  # answers with a choice of tokens
    "pooler",  # reads the first token for a classifier
)
"""Names of parts of a backbone that no language modeling loss sends a gradient to."""

CLASSIFIERS = ("score", "classifier")
"""Names of the linear head of a sequence classification model."""


@dataclass(frozen=True)
class Stream:
    """How the residual stream between layers is laid out; `[B, T, d]` unless the type says otherwise.

    Attributes:
        copies_dim: dimension that holds parallel copies of the stream in `h.dim() = 4`, or None for one copy.
        folded: parallel copies stand side by side in the last dimension, `[B, T, n d]`.
    """

    copies_dim: int | None = None
    folded: bool = False

    def enter(self, state: Tensor) -> Tensor:
        """The shadow state `[B, T, d]` in the layout of the stream, one copy."""
        if self.folded:
            return state.unsqueeze(-2)
        return state if self.copies_dim is None else state.unsqueeze(self.copies_dim)

    def split(self, h: Tensor, width: int) -> Tensor:
        """A hidden state with its copies in a dimension of their own, so that its last dimension is d = `width`."""
        return h.unflatten(-1, (-1, width)) if self.folded else h


STREAMS: dict[str, Stream] = {
    "deepseek_v4": Stream(copies_dim=2),
    "gemma3n_text": Stream(copies_dim=0),
    "hy_v4": Stream(copies_dim=2),
    "qwen4_exp_text": Stream(folded=True),
}
"""`model_type` -> layout of its residual stream, where it is not `[B, T, d]`."""


@dataclass(frozen=True)
class Decoder:
    """A base's decoder.

    Attributes:
        backbone: the model without its task head that runs the layers.
        path: where the backbone stands in the base; empty when the base is the backbone.
        head_input_path: where the model stands whose output the base's task class hands to its head.
        layers_path: where the layers stand in the backbone.
        layers: the decoder layers, in order.
        config: the config of the decoder.
    """

    backbone: PreTrainedModel
    path: str
    head_input_path: str
    layers_path: str
    layers: tuple[nn.Module, ...]
    config: PreTrainedConfig

    @property
    def end(self) -> nn.Module:
        """The model whose output is the final hidden state, whether the base runs with its task head or without."""
        inner = READ_BY_HEAD.get(self.config.model_type, "")
        return self.backbone.get_submodule(inner[len(self.path) + 1 :]) if inner else self.backbone

    @property
    def input_name(self) -> str:
        """Keyword of the hidden state in a call of a decoder layer."""
        return INPUT_NAMES.get(self.config.model_type, "hidden_states")

    @property
    def stream(self) -> Stream:
        """Layout of the residual stream between layers."""
        return STREAMS.get(self.config.model_type, Stream())

    @property
    def first_position(self) -> int:
        """Position of a sequence's first token."""
        return self.config.pad_token_id + 1 if self.config.model_type in COUNTS_FROM_PADDING else 0

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states between layers."""
        return read_size(self.config, "hidden_size")


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find a model's decoder.

    Args:
        model: any transformers model with a decoder.

    Returns:
        Where it stands.

    Raises:
        TypeError: not a transformers model.
        ValueError: its type is unsupported, its layers cannot be told, or there are fewer than two.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"The base must be a transformers PreTrainedModel, got {type(model).__name__}.")
    config = model.config.get_text_config(decoder=True)
    reason = UNSUPPORTED.get(config.model_type) or UNSUPPORTED.get(model.config.model_type)
    if reason is not None:
        raise ValueError(f"ShadowPEFT does not support {config.model_type!r} ({type(model).__name__}): {reason}")
    path, layers = _layers_of(model, config)
    backbone_path, outermost = _model_paths(model, path)
    head_input_path = READ_BY_HEAD.get(config.model_type, outermost)
    backbone = model.get_submodule(backbone_path)
    assert isinstance(backbone, PreTrainedModel)
    inner = path[len(backbone_path) + 1 :] if backbone_path else path
    return Decoder(backbone, backbone_path, head_input_path, inner, tuple(layers), config)


def classifier_name(model: PreTrainedModel) -> str | None:
    """Where a model keeps its linear classification head, or None."""
    return next((name for name in CLASSIFIERS if isinstance(model._modules.get(name), nn.Linear)), None)


def read_size(config: PreTrainedConfig, size: str) -> int:
    """A size of a config under any of the names configs use for it.

    Raises:
        ValueError: the config has none of them.
    """
    value = getattr(config, _size_name(config, size))
    if not isinstance(value, int):
        raise ValueError(f"The {size} of {type(config).__name__} is {value!r}, not an integer.")
    return value


def write_size(config: PreTrainedConfig, size: str, value: int) -> None:
    """Set a size of a config under the name that it uses.

    Raises:
        ValueError: the config has no such size.
    """
    setattr(config, _size_name(config, size), value)


def _size_name(config: PreTrainedConfig, size: str) -> str:
    for name in SIZE_NAMES[size]:
        if hasattr(config, name):
            return name
    raise ValueError(f"{type(config).__name__} has no {size} (looked for {', '.join(SIZE_NAMES[size])}).")


def _layers_of(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, nn.ModuleList]:
    declared = LAYERS.get(config.model_type)
    count = read_size(config, "num_hidden_layers")
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _may_be_layers(path, module, count, declared)
    ]
    own = [(p, m) for p, m in found if _owners(model, p)[-1][1].config.model_type == config.model_type]
    outermost = [(p, m) for p, m in own if not any(p.startswith(f"{q}.") for q, _ in own)]
    if len(outermost) != 1:
        where = ", ".join(path for path, _ in outermost) or "none"
        raise ValueError(
            f"Cannot tell which modules are the {count} decoder layers of {type(model).__name__} "
            f"(model_type {config.model_type!r}); candidates: {where}. Declare it in shadow_peft.base.architectures."
        )
    if count < MIN_LAYERS:
        raise ValueError(
            f"ShadowPEFT needs a base of at least {MIN_LAYERS} decoder layers, {type(model).__name__} has {count}."
        )
    return outermost[0]


def _may_be_layers(path: str, module: nn.ModuleList, count: int, declared: str | None) -> bool:
    if declared is not None:
        return path == declared or path.endswith(f".{declared}")
    return len(module) == count


def _model_paths(model: PreTrainedModel, layers_path: str) -> tuple[str, str]:
    """Where the backbone stands, and the outermost model inside that is no task model and takes embeddings.

    They are the same, but for a model with other modalities: there the backbone is the innermost model around the layers.
    """
    owners = _owners(model, layers_path)
    innermost = owners[-1][0]
    is_task_model = model.get_output_embeddings() is not None or model.base_model is not model
    inside = owners[1:] if is_task_model and len(owners) > 1 else owners
    outermost = next((path for path, owner in inside if _takes_embeddings(owner)), innermost)
    has_other_modalities = model.config.get_text_config(decoder=True) is not model.config
    return (innermost if has_other_modalities else outermost), outermost


def _takes_embeddings(model: PreTrainedModel) -> bool:
    return "inputs_embeds" in inspect.signature(type(model).forward).parameters


def _owners(model: PreTrainedModel, path: str) -> list[tuple[str, PreTrainedModel]]:
    """The models around a module, outermost first, with their paths."""
    parts = path.split(".")[:-1]
    prefixes = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    found = [(prefix, model.get_submodule(prefix)) for prefix in prefixes]
    return [(prefix, owner) for prefix, owner in found if isinstance(owner, PreTrainedModel)]
