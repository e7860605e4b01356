"""What is special about single architectures: one table, and the names that configs use for sizes.

Almost every decoder is found and adapted by the generic rules of `decoder`, `backbone.truncated_config` and
`backbone.implicit`. `ARCHITECTURES` declares what a rule cannot know, one entry per `model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ResidualStream:
    """How the residual stream between layers is laid out; `[B, T, d]` unless the type says otherwise.

    Attributes:
        copies_dim: dimension that holds parallel copies of the stream in `h.dim() = 4`, or None for one copy.
        folded: parallel copies are side by side in the last dimension, `[B, T, n d]`.
    """

    copies_dim: int | None = None
    folded: bool = False

    @property
    def rows_dim(self) -> int:
        """The dimension of the rows of a batch in the stream."""
        return 1 if self.copies_dim == 0 else 0

    def expand(self, state: Tensor) -> Tensor:
        """The shadow state `[B, T, d]` in the layout of the stream, one copy."""
        if self.folded:
            return state.unsqueeze(-2)
        return state if self.copies_dim is None else state.unsqueeze(self.copies_dim)

    def split(self, h: Tensor, width: int) -> Tensor:
        """A hidden state with its copies in a dimension of their own, so that its last dimension is d = `width`."""
        return h.unflatten(-1, (-1, width)) if self.folded else h


@dataclass(frozen=True)
class Architecture:
    """What differs from Llama in a decoder of one `model_type`.

    Attributes:
        unsupported: why this type cannot be adapted; None if it can.
        layers_path: where the decoder layers are inside the backbone, where the generic rule of `decoder` is not enough.
        layer_input_name: keyword of the hidden state in a call of a decoder layer.
        residual_stream: layout of the residual stream between layers.
        counts_from_padding: the first token has the position `pad_token_id + 1`.
        needs_token_ids: the backbone looks token ids up beside the embeddings.
        token_tables: tables that it looks them up in; each row holds one part per layer, side by side.
        layer_rows: linear layers of the backbone whose rows hold one part per layer, one below the other.
        non_text_modules: modules of the backbone that read something else than text; an implicit backbone is without them.
        head_input_path: the model inside a causal LM whose output the head reads, where that is not the outermost one that
            takes embeddings.
        modifies_outputs_in_place: the output of a linear layer is modified in place, so autograd cannot keep it.
        last_layer_kind: the kind that the config forces on the last layer when it is loaded.
        shared_layer_kind: the kind of layer whose weights all layers of that kind share.
        min_exported_layers: the fewest layers that its config accepts when it is loaded, and why.
    """

    unsupported: str | None = None
    layers_path: str | None = None
    layer_input_name: str = "hidden_states"
    residual_stream: ResidualStream = ResidualStream()
    counts_from_padding: bool = False
    needs_token_ids: bool = False
    token_tables: tuple[str, ...] = ()
    layer_rows: tuple[str, ...] = ()
    non_text_modules: tuple[str, ...] = ()
    head_input_path: str | None = None
    modifies_outputs_in_place: bool = False
    last_layer_kind: str | None = None
    shared_layer_kind: str | None = None
    min_exported_layers: tuple[int, str] = (1, "")


_DRAFTER = Architecture(unsupported="it is a drafter whose layers read the keys and values of another model")
_CODEBOOKS = Architecture(unsupported="it predicts several audio codebooks at every step, each with a head of its own")
_NOT_CAUSAL = Architecture(unsupported="it is not causal")
_ROBERTA = Architecture(counts_from_padding=True)

ARCHITECTURES: dict[str, Architecture] = {
    "blt": Architecture(
        unsupported="it has three decoders: bytes, patches and bytes again, with cross attention between them",
    ),
    "camembert": _ROBERTA,
    "cpmant": Architecture(unsupported="it is not causal, and its forward takes no embeddings"),
    "data2vec-text": _ROBERTA,
    "deepseek_v4": Architecture(residual_stream=ResidualStream(copies_dim=2), needs_token_ids=True),
    "falcon": Architecture(modifies_outputs_in_place=True),
    "gemma3n_text": Architecture(
        layers_path="layers",
        residual_stream=ResidualStream(copies_dim=0),
        needs_token_ids=True,
        token_tables=("embed_tokens_per_layer",),
        layer_rows=("per_layer_model_projection",),
        modifies_outputs_in_place=True,
    ),
    "gemma4_assistant": _DRAFTER,
    "gemma4_text": Architecture(
        needs_token_ids=True,
        token_tables=("embed_tokens_per_layer",),
        layer_rows=("per_layer_model_projection",),
        last_layer_kind="full_attention",
    ),
    "gemma4_unified_assistant": _DRAFTER,
    "gemma4_unified_text": Architecture(last_layer_kind="full_attention"),
    "git": Architecture(non_text_modules=("image_encoder", "visual_projection")),
    "granite_swa": Architecture(layers_path="layers"),
    "granitemoe_swa": Architecture(layers_path="layers"),
    "hrm_text": Architecture(
        unsupported="its two groups of layers alternate several times on every token, so a layer has no one place in depth",
    ),
    "hy_v4": Architecture(residual_stream=ResidualStream(copies_dim=2)),
    "llama4_text": Architecture(modifies_outputs_in_place=True),
    "musicgen_decoder": _CODEBOOKS,
    "musicgen_melody_decoder": _CODEBOOKS,
    "olmo_hybrid": Architecture(min_exported_layers=(2, "its config wants a recurrent and an attention layer")),
    "opt": Architecture(head_input_path="model.decoder"),
    "phi4_multimodal": Architecture(non_text_modules=("embed_tokens_extend",)),
    "prophetnet": Architecture(
        unsupported="its decoder is not causal: the n-gram streams that its layers carry beside the main stream look ahead",
    ),
    "qwen4_exp_text": Architecture(residual_stream=ResidualStream(folded=True)),
    "reformer": Architecture(
        unsupported="its layers are reversible: each takes and returns two streams, which its own backward pass restores",
    ),
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "roc_bert": Architecture(modifies_outputs_in_place=True),
    "rwkv": Architecture(
        unsupported="its initialisation divides by the number of layers less one, so one layer alone cannot be built",
    ),
    "xlm": Architecture(
        unsupported="it has no decoder layers: its attentions, feed-forward parts and norms are in lists of their own",
    ),
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "xlnet": _NOT_CAUSAL,
    "xmod": _ROBERTA,
    "zamba": Architecture(shared_layer_kind="hybrid"),
}
"""`model_type` of a decoder's config -> what is special about it."""

_LIKE_LLAMA = Architecture()


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """What is special about the decoder of a config."""
    return ARCHITECTURES.get(config.model_type, _LIKE_LLAMA)


WITHOUT_GRADIENT = (
    *("encoder_attn", "encoder_attn_layer_norm", "crossattention", "ln_cross_attn"),  # read an encoder; there is none
    "indexer",  # answers with a choice of tokens
    "pooler",  # reads the first token for a classifier
)
"""Names of parts of a backbone that no language modeling loss sends a gradient to."""

CLASSIFIERS = ("score", "classifier")
"""Names of the linear head of a sequence classification model."""


class MlpNames(NamedTuple):
    """Names of the linear layers of an MLP."""

    gate: str
    up: str
    down: str


class AttentionNames(NamedTuple):
    """Names of the linear layers of an attention."""

    query: str
    key: str
    value: str
    output: str


MLP = MlpNames("gate_proj", "up_proj", "down_proj")
ATTENTION = AttentionNames("q_proj", "k_proj", "v_proj", "o_proj")
"""What can be pruned; a layer that names its parts otherwise can initialise an implicit backbone at full width only."""

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
