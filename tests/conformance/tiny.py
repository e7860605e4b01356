"""A tiny random model of every type in transformers' ``MODEL_FOR_CAUSAL_LM_MAPPING``.

``tiny_config(model_type)`` builds the configuration from two declared tables and nothing else:

* ``SIZES``: sizes by attribute name. An entry applies to every configuration class that declares a field of that name,
  nested text and vision configurations included.
* ``OVERRIDES``: what one type needs on top (layer patterns that hold both kinds of layer of a hybrid, consistent head
  sizes, and so on), keyed by the ``model_type`` of the configuration it applies to.

``NOT_APPLICABLE`` names the types that are no decoder-only causal language model or cannot be built here, and why.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

VOCAB = 96
HIDDEN = 32
LAYERS = 4
HEADS = 4
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 4  # the ids below are special in at least one type

SIZES: dict[str, Any] = {
    # tables
    "vocab_size": VOCAB,
    "decoder_vocab_size": VOCAB,
    "type_vocab_size": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "context_length": 128,
    "max_target_positions": 128,
    "model_max_length": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": EOS,
    "image_token_id": 3,
    "image_token_index": 3,
    "video_token_id": 3,
    "audio_token_id": 3,
    # widths
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "n_embd": HIDDEN,
    "emb_dim": HIDDEN,
    "embedding_size": HIDDEN,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    "dff": 48,
    "dim_ff": 48,
    "shared_intermediate_size": 24,
    # depth
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    # heads
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_heads": HEADS,
    "attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "num_decoder_attention_heads": HEADS,
    "num_encoder_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "dim_head": 8,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # windows, shorter than the sequences of the checks
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "window_size": 8,
    "local_attention": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # recurrent and linear layers
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    # sparse attention indexers
    "index_head_dim": 8,
    "index_n_heads": 16,  # its scores pass a relu: with few heads many tie at zero, and a tie is broken by chance
    "index_topk": 6,
    # initialisation wide enough for a change to show in the logits
    "initializer_range": 0.1,
    "init_std": 0.1,
    "embed_init_std": 0.1,
    "is_decoder": True,
    "use_cache": True,
}

ALTERNATING = ["sliding_attention", "full_attention"] * 2
RECURRENT_THEN_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
CONV_THEN_FULL = ["conv", "full_attention", "conv", "full_attention"]
HYBRID_PAIRS = ["hybrid_sliding", "hybrid"] * 2
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse", "sparse"]
ONE_KV_HEAD_PER_HEAD = {"num_key_value_heads": HEADS}  # latent attention expands to one per head
MAMBA2_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16}  # heads x head width = expand x hidden

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_experts": 4},
    "axk1": ONE_KV_HEAD_PER_HEAD,
    "axk2": ONE_KV_HEAD_PER_HEAD,
    "bailing_hybrid": {
        **ONE_KV_HEAD_PER_HEAD,
        "num_local_experts": 4,
        "layer_types": RECURRENT_THEN_FULL,
        "mlp_layer_types": DENSE_THEN_SPARSE,
    },
    "bamba": {**MAMBA2_HEADS, "attn_layer_indices": [1, 3]},
    "beam": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_THEN_SPARSE},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "layer_types": ALTERNATING},
    "cohere2_moe": {"logit_scale": 1.0, "layer_types": ALTERNATING},
    "cohere_compass_text": {
        "layer_types": ALTERNATING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "cwm": {"layer_types": ALTERNATING},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": ONE_KV_HEAD_PER_HEAD,
    "deepseek_v3": ONE_KV_HEAD_PER_HEAD,
    "deepseek_v32": ONE_KV_HEAD_PER_HEAD,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    # not is_moe: its router splits the logits across tokens and so is not causal (a remark in its source says so)
    "doge": {"keep_window_size": 128},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * LAYERS,
        "adapter_in_dim": HIDDEN,
        "adapter_out_dim": HIDDEN,
    },
    "dots3_note_text": {
        **ONE_KV_HEAD_PER_HEAD,
        "head_dim": 12,
        "shared_experts_intermediate_size": 16,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "exaone4": {"layer_types": ALTERNATING},
    "exaone_moe": {"layer_types": ALTERNATING},
    "falcon": {"new_decoder_architecture": True, "multi_query": False},
    "falcon_h1": {**MAMBA2_HEADS, "mamba_d_ssm": 64},
    "gemma3_text": {"layer_types": ALTERNATING},
    "gemma3n_text": {
        "layer_types": ALTERNATING,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 3,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": ALTERNATING,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "gemma4_unified_text": {"layer_types": ALTERNATING, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "gemma4_unified_vision": {"mm_embed_dim": HIDDEN, "patch_size": 4},
    "gemma4_vision": {"position_embedding_size": 16},
    "gemma4_audio": {"subsampling_conv_channels": [8, 8], "output_proj_dims": HIDDEN},
    "glm4_moe_lite": ONE_KV_HEAD_PER_HEAD,
    "glm_moe_dsa": ONE_KV_HEAD_PER_HEAD,
    "got_ocr2_vision": {"output_channels": 8, "mlp_dim": 48, "image_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite_swa": {"layer_types": ALTERNATING},
    "granitemoe_swa": {"layer_types": ALTERNATING},
    "granitemoehybrid": {**MAMBA2_HEADS, "layer_types": RECURRENT_THEN_FULL},
    "hrm_text": {"num_hidden_layers": 2},
    "inkling_text": {
        "layer_types": HYBRID_PAIRS,
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "logits_mup_width_multiplier": 1.0,
    },
    "inkling2_text": {
        "layer_types": HYBRID_PAIRS,
        "unpadded_vocab_size": VOCAB,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "n_layers_per_attn_res_block": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "kimi_linear": {
        **ONE_KV_HEAD_PER_HEAD,
        "num_local_experts": 4,
        "linear_head_dim": 8,
        "linear_num_heads": HEADS,
        "layer_types": RECURRENT_THEN_FULL,
        "mlp_layer_types": DENSE_THEN_SPARSE,
    },
    "kolibri1": {"layer_types": ALTERNATING},
    "laguna": {"layer_types": ALTERNATING, "num_attention_heads_per_layer": [4, 2, 4, 2]},
    "lfm2": {"layer_types": CONV_THEN_FULL, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": CONV_THEN_FULL},
    "lfm3": {"layer_types": CONV_THEN_FULL},
    "llama4_text": {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "longcat_flash": {**ONE_KV_HEAD_PER_HEAD, "head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "mellum": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_THEN_SPARSE},
    "minicpm3": ONE_KV_HEAD_PER_HEAD,
    "minimax_m3_vl_text": {"dense_intermediate_size": 48, "shared_intermediate_size": 16},
    "ministral": {"layer_types": ALTERNATING},
    "mllama_text_model": {"cross_attention_layers": [1], "intermediate_size": 48},
    "moshi": {"sliding_window": 128},
    "modernbert-decoder": {"layer_types": ALTERNATING},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo3": {"layer_types": ALTERNATING},
    "olmo_hybrid": {"layer_types": RECURRENT_THEN_FULL},
    "phi4_multimodal_audio": {
        "num_blocks": 1,
        "ext_pw_out_channel": HIDDEN,
        "depthwise_separable_out_channel": HIDDEN,
        "nemo_conv_channels": 8,
    },
    "phi4_multimodal_vision": {"image_size": 28, "crop_size": 28},
    "qwen2": {"layer_types": ALTERNATING, "use_sliding_window": True},
    "qwen2_moe": {"layer_types": ALTERNATING, "use_sliding_window": True, "mlp_only_layers": [0]},
    "qwen3": {"layer_types": ALTERNATING, "use_sliding_window": True},
    "qwen3_5_moe_text": {"layer_types": RECURRENT_THEN_FULL},
    "qwen3_5_text": {"layer_types": RECURRENT_THEN_FULL},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"layer_types": RECURRENT_THEN_FULL, "mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 6,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"lru_width": HIDDEN, "block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 24, "output_embedding_size": 40},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCAB,
    },
    "rwkv": {"attention_hidden_size": HIDDEN},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "whisper": {"begin_suppress_tokens": None},
    "xlm": {"causal": True},
    "xlnet": {"d_inner": 48},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "youtu": ONE_KV_HEAD_PER_HEAD,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": HEADS,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": HEADS,
        "n_mamba_heads": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "layer_types": HYBRID_PAIRS},
}

NOT_APPLICABLE: dict[str, str] = {
    "blt": "no single decoder stack: bytes run through a local encoder, patches through a global transformer, bytes "
    "again through a local decoder, with cross attention between them (nor can transformers 5.23 run it with a cache: "
    "'BltConfig' has no num_hidden_layers)",
    "gemma3n": "the multimodal wrapper needs the package timm for its vision tower; its text decoder is gemma3n_text",
    "gemma4_assistant": "no model of its own: a drafter whose layers all read the key/value states of a Gemma 4 target "
    "(transformers 5.23 cannot build it: its configuration demands that all layers share them, which the "
    "kv_sharing_modes of Gemma4TextConfig refuse)",
    "gemma4_unified_assistant": "no model of its own: a drafter that reads the key/value states of a Gemma 4 target "
    "(inputs_embeds and shared_kv_states are required, input_ids are not enough)",
    "musicgen": "the mapping lists the encoder-decoder configuration, which MusicgenForCausalLM cannot be built from; "
    "its decoder predicts several audio codebooks per step and has one head per codebook",
    "musicgen_melody": "the mapping lists the encoder-decoder configuration, which MusicgenMelodyForCausalLM cannot be "
    "built from; its decoder predicts several audio codebooks per step and has one head per codebook",
}


def model_types() -> list[str]:
    """All types of the mapping, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def applicable_types() -> list[str]:
    """The types that can be built and run tiny, sorted."""
    return [name for name in model_types() if name not in NOT_APPLICABLE]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of ``model_type``."""
    return _build(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random causal language model of ``model_type``: float32, in eval mode, the same for the same seed."""
    if model_type in NOT_APPLICABLE:
        raise ValueError(f"No tiny {model_type!r}: {NOT_APPLICABLE[model_type]}")
    logging.set_verbosity_error()  # of every optional kernel that is not installed, a warning
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    _stir(model)
    model.generation_config.eos_token_id = None  # a random model must not end a comparison early
    model.generation_config.pad_token_id = PAD
    return model.eval()


def _build(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """An instance of ``config_class`` from ``SIZES`` and ``overrides``, nested configurations included."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: size for name, size in SIZES.items() if name in fields}
    values |= {name: _nested(config_class, name) for name in config_class.sub_configs if name in fields}
    return config_class(**(values | overrides))


def _nested(config_class: type[PreTrainedConfig], name: str) -> PreTrainedConfig:
    """The tiny configuration of the part ``name`` of a composite ``config_class``."""
    spec = config_class.sub_configs_defaults.get(name)
    part = CONFIG_MAPPING[spec.model_type] if spec is not None and spec.model_type else config_class.sub_configs[name]
    return _build(part, OVERRIDES.get(part.model_type, {}))


@torch.no_grad()
def _stir(model: PreTrainedModel) -> None:
    """Add noise to the parameters that initialisation left constant (biases, norms, zeroed gates)."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and parameter.float().std() == 0:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
