"""Tiny models and adapters for every test.

BASES          three layouts of a decoder: rotary positions, rotary with normed heads, absolute positions
CLASSIFIERS    the same with a classification head
FAMILIES       the bases, and other kinds of attention and state: sliding windows, experts, short convolutions
CROPPABLE      names of the families whose cache can be cropped
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, get_shadow_model
from shadow_peft.model import ShadowPeftModel

INTEROP = Path(__file__).parent / "fixtures" / "interop"

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama(seed: int = 0, **sizes: object) -> LlamaForCausalLM:
    """A random Llama in eval mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).eval()


def qwen3(seed: int = 0, **sizes: object) -> Qwen3ForCausalLM:
    """A random Qwen3 in eval mode."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **sizes})).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2, with absolute positions and a table called `wte`, in eval mode."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_gpt2_config()).eval()


def _gpt2_config(**more: object) -> GPT2Config:
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 96, "n_positions": 128}
    config = GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, **more)
    config.eos_token_id = None
    return config


def llama_classifier(seed: int = 0, **sizes: object) -> LlamaForSequenceClassification:
    """A random Llama classifier of three classes in eval mode."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**{**SIZES, "num_labels": 3, **sizes})).eval()


def qwen3_classifier(seed: int = 0, **sizes: object) -> Qwen3ForSequenceClassification:
    """A random Qwen3 classifier of three classes in eval mode."""
    torch.manual_seed(seed)
    return Qwen3ForSequenceClassification(Qwen3Config(**{**SIZES, "num_labels": 3, **sizes})).eval()


def gpt2_classifier(seed: int = 0) -> GPT2ForSequenceClassification:
    """A random GPT-2 classifier of three classes in eval mode."""
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(_gpt2_config(num_labels=3)).eval()


def gemma2(**settings: object) -> Gemma2ForCausalLM:
    """A random Gemma 2, whose logits can be capped, in eval mode."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **settings)).eval()


def cohere(**settings: object) -> CohereForCausalLM:
    """A random Cohere, whose logits can be scaled, in eval mode."""
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SIZES, **settings)).eval()


def gemma3(sliding_window: int = 6) -> Gemma3ForCausalLM:
    """A random Gemma 3 in eval mode: sliding windows beside full attention."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, layer_types=kinds, sliding_window=sliding_window)).eval()


def mixtral() -> MixtralForCausalLM:
    """A random mixture of experts in eval mode."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


def lfm2() -> Lfm2ForCausalLM:
    """A random hybrid of short convolutions and attention in eval mode."""
    torch.manual_seed(0)
    kinds = ["conv", "full_attention"] * 2
    return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=kinds, block_auto_adjust_ff_dim=False)).eval()


BASES: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2}
CLASSIFIERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama_classifier,
    "qwen3": qwen3_classifier,
    "gpt2": gpt2_classifier,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {**BASES, "gemma3": gemma3, "mixtral": mixtral, "lfm2": lfm2}
CROPPABLE = [name for name in FAMILIES if name != "lfm2"]


def with_nonzero_weights(model: ShadowPeftModel, seed: int = 7) -> ShadowPeftModel:
    """The adapter with up maps that are not zero, so that injection and read-out show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        ups = model.shadow_injection_model.injection_ups
        published = model.shadow_readout_model is None
        ups.copy_(torch.randn(ups.shape, generator=generator) * (0.3 if published else 0.01))
        if published:
            model.shadow_injection_model.injection_downs.mul_(10)
        for zero in zeros_at_the_end(model):
            zero.copy_(torch.randn(zero.shape, generator=generator) * 0.3)
    return model


def zeros_at_the_end(model: ShadowPeftModel) -> list[torch.Tensor]:
    """What starts at zero behind the layers, in the variant "readout"."""
    output, readout = model.shadow_output_model, model.shadow_readout_model
    if output is None or readout is None:
        return []
    return [output.output_ups, readout.gate_up, readout.gate_bias, readout.up]


def adapted(
    base: PreTrainedModel, seed: int = 1, shadow_model: PreTrainedModel | None = None, **config: object
) -> ShadowPeftModel:
    """A base with an adapter whose weights are not zero, in eval mode."""
    torch.manual_seed(seed)
    settings = {"alpha": 0.7, "dropout": 0.0, "injection_hidden_size": 8, "gate_hidden_size": 6, **config}
    peft_model = get_shadow_model(base, ShadowConfig(**settings), shadow_model=shadow_model)
    return with_nonzero_weights(peft_model).eval()


def causal_lm(base: PreTrainedModel, shadow_loss_weight: float = 0.05, **config: object) -> ShadowForCausalLM:
    """A causal LM with a stirred adapter."""
    return ShadowForCausalLM(adapted(base, **config), shadow_loss_weight=shadow_loss_weight)


def classifier(base: PreTrainedModel, **config: object) -> ShadowForSequenceClassification:
    """A classifier with a stirred adapter and heads that differ."""
    model = ShadowForSequenceClassification(adapted(base, **config))
    with torch.no_grad():
        model.shadow_classifier_head.weight.mul_(-1.5)
    return model


def tokens(batch: int = 3, length: int = 10, seed: int = 3) -> torch.Tensor:
    """Token ids `[B, T]` without padding."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def slopes(model: torch.nn.Module, loss: Callable[[], torch.Tensor], h: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The slope of a loss along a random direction of length 1: by differences of `2 h`, and by the gradients there are."""
    trained = [p for p in model.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    length = torch.stack([d.square().sum() for d in direction]).sum().sqrt()
    by_gradient = torch.stack([(p.grad * d).sum() for p, d in zip(trained, direction, strict=True)]).sum() / length
    ends = []
    with torch.no_grad():
        for step in (h, -2 * h, h):  # there, to the other side, and back
            for p, d in zip(trained, direction, strict=True):
                p.add_(d, alpha=float(step / length))
            ends.append(loss())
    return (ends[0] - ends[1]) / (2 * h), by_gradient
