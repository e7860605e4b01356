"""Who decodes: bare base, PEFT's LoRA and DoRA, the two published shadows, ours, ours drafting.

This file runs in two environments, ours and that of the published package of the same name; each contender imports what it
needs when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.shapes import Shape

WIDTH, LAYERS, VOCABULARY, INTERMEDIATE = 512, 12, 8192, 1536
BACKBONE: dict[str, int] = {
    "shadow_intermediate_size": 256, "shadow_num_attention_heads": 4, "shadow_num_key_value_heads": 2
}  # fmt: skip
"""One layer with half the heads and a thin MLP: every contender then trains about 1.17 M parameters, 2.5 % of the base."""
PUBLISHED_SIZES: dict[str, Any] = {**BACKBONE, "injection_hidden_size": 16, "gate_hidden_size": 10, "dropout": 0.0}
REAL_PUBLISHED_SIZES: dict[str, Any] = {"injection_hidden_size": 64, "gate_hidden_size": 16, "alpha": 1.0, "dropout": 0.0}
"""On SmolLM2-135M the published variant with these, "readout" with its defaults and LoRA of rank 22 train 6.7 to 6.8 M."""
TUNER_SIZES: dict[str, Any] = {
    "r": 12, "update_hidden_size": 10, "shadow_num_hidden_layers": 1, "shadow_intermediate_size": 160,
    "shadow_num_attention_heads": 4, "shadow_dropout": 0.0,
}  # fmt: skip
OUR_SIZES: dict[str, Any] = {
    **BACKBONE, "injection_hidden_size": 20, "output_hidden_size": 10, "readout_hidden_size": 16
}  # fmt: skip


@dataclass
class Source:
    """Folders of a real base and of an adapter for it, or a shape; None is a random base, and a fresh adapter."""

    base: str | None = None
    adapter: str | None = None
    shape: Shape | None = None
    device: str = "cpu"
    dtype: str = "float32"


SOURCE = Source()
"""What this process measures."""


def make_base() -> PreTrainedModel:
    """A base that never ends a text: the one of `SOURCE`, or a random Llama of 46 M parameters in float32."""
    if SOURCE.shape is not None:
        return SOURCE.shape.random_base(SOURCE.device, SOURCE.dtype)
    torch.manual_seed(0)
    if SOURCE.base is not None:
        base = AutoModelForCausalLM.from_pretrained(SOURCE.base, dtype=torch.bfloat16).eval()
        base.generation_config.eos_token_id = None
        return base
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bare() -> nn.Module:
    """The base itself."""
    return make_base()


def lora(**options: Any) -> nn.Module:
    """Unmerged LoRA on every linear layer but the head, as large as the shadow."""
    from peft import LoraConfig, get_peft_model

    sizes: dict[str, Any] = {"r": 10 if SOURCE.base is None else 22, "target_modules": "all-linear", **options}
    if SOURCE.shape is not None:
        sizes = SOURCE.shape.lora(**{"dora": options.get("use_dora", False)})
    return get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM", **sizes)).eval()


def dora() -> nn.Module:
    """LoRA with trained magnitudes."""
    return lora(use_dora=True)


def published() -> nn.Module:
    """`shadow-peft` 0.1.1."""
    from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

    sizes = PUBLISHED_SIZES if SOURCE.shape is None else SOURCE.shape.published()
    model = ShadowForCausalLM(get_shadow_model(make_base(), ShadowConfig(**sizes))).eval()
    return model.to(getattr(torch, SOURCE.dtype))  # it does not mix dtypes


def tuner() -> nn.Module:
    """The Shadow tuner of `peft`."""
    from peft import ShadowConfig, get_peft_model

    sizes = TUNER_SIZES if SOURCE.shape is None else SOURCE.shape.tuner()
    model = get_peft_model(make_base(), ShadowConfig(task_type="CAUSAL_LM", **sizes)).eval()
    return model.to(getattr(torch, SOURCE.dtype))  # it does not mix dtypes


def ours(**config: Any) -> nn.Module:
    """This library, its variant "readout" unless `config` says otherwise."""
    from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

    if SOURCE.adapter is not None:
        return ShadowForCausalLM.from_pretrained(make_base(), SOURCE.adapter)
    if SOURCE.shape is not None:
        sizes = SOURCE.shape.readout()
    else:
        sizes = {} if SOURCE.base else OUR_SIZES
    config = {"variant": "readout", **(config or sizes)}
    init = "base" if SOURCE.base else "random"
    return ShadowForCausalLM(get_shadow_model(make_base(), ShadowConfig(**config, shadow_init=init))).eval()


def ours_published() -> nn.Module:
    """This library with the published mathematics, as `shadow-peft` 0.1.x has it."""
    if SOURCE.shape is not None:
        return ours(**SOURCE.shape.published(), variant="published")
    return ours(**(REAL_PUBLISHED_SIZES if SOURCE.base else PUBLISHED_SIZES), variant="published")


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "bare base": bare,
    "LoRA": lora,
    "DoRA": dora,
    "shadow-peft 0.1.1": published,
    "peft Shadow": tuner,
    "ours, variant published": ours_published,
    "ours": ours,
}

PUBLISHED = "shadow-peft 0.1.1"
"""The contender that needs the environment of the peers."""


def draft_with_oracle(texts: Tensor, acceptance: float, seed: int) -> None:
    """Let shadows draft the token that the base is going to write with probability `acceptance`, and another one else.

    Backbone and head run as they do with a real shadow; only what they propose is replaced.

    Args:
        texts: what the base writes without drafting, `[B, M]`.
        acceptance: in [0, 1].
        seed: of what is proposed wrongly.
    """
    from shadow_peft.generation import batched, candidate_generator, mixin

    generator = torch.Generator().manual_seed(seed)

    def propose(logits: Tensor, places: Tensor) -> Tensor:
        places = places.to(texts.device)
        right = texts[torch.arange(len(texts), device=texts.device), places.clamp(max=texts.shape[1] - 1)]
        wrong = (torch.rand(len(texts), generator=generator) >= acceptance).to(texts.device)
        return torch.full_like(logits, -30.0).scatter(1, ((right + wrong.long()) % logits.shape[-1])[:, None], 0.0)

    class Oracle(candidate_generator.ShadowCandidateGenerator):
        def processed_logits(self, state: Tensor, ahead: int) -> Tensor:
            return propose(super().processed_logits(state, ahead), torch.tensor([self._text.shape[1]]))

    class BatchedOracle(batched.BatchedDrafting):
        def processed_logits(self, state: Tensor, ahead: int) -> Tensor:
            return propose(super().processed_logits(state, ahead), self._texts.lengths + ahead)

    mixin.ShadowCandidateGenerator, mixin.BatchedDrafting = Oracle, BatchedOracle  # type: ignore[misc]
