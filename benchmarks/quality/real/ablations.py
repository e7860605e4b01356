"""What the shadow is for: contenders with a part of it taken away, each as large as the whole.

*-zero-state        s = 0 in injection, update and read-out; the shadow still learns its own loss, which nothing reads
*-frozen-untrained  a random backbone that stays as it is; what it would have trained goes to the low-rank weights
*-frozen-pretrained the pretrained backbone, frozen likewise
*-pretrained        the pretrained backbone, trained at 0.3 of the rate of the rest
readout-unnormalized  the injection compares the states as they are
readout-only        read-out without injection and output correction
readout-injection   injection and output correction without read-out
readout-correction  output correction alone: s reaches nothing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.methods import Contender
from benchmarks.quality.real.contenders import (
    BUDGET,
    INJECTED,
    OURS_LOSS_WEIGHT,
    PRETRAINED_RATE,
    WIDTH,
    backbone,
    native,
    published,
    readout,
    shadow_folder,
)  # fmt: skip


def published_without_state(base: Any) -> Contender:
    """The base is coupled to a state of zeros, which the config offers in the variant "readout" alone."""
    contender = published(base)
    adapted: Any = contender.model.peft_model
    couple = adapted.make_coupling

    def with_zeros(state: Tensor, keep_head_input: bool = False) -> Any:
        return couple(torch.zeros_like(state), keep_head_input)

    adapted.make_coupling = with_zeros
    return contender


def frozen(contender: Contender) -> Contender:
    """The backbone is not trained."""
    backbone(contender).requires_grad_(False)
    return contender


def without(contender: Contender, *parts: str) -> Contender:
    """Parts of the adapted model stay as they were made: they change nothing."""
    for name in parts:
        getattr(contender.model.peft_model, name).requires_grad_(False)
    return contender


def rank_for(budget: int, per_rank: int) -> int:
    """The largest rank within a budget."""
    return max(1, budget // per_rank)


def readout_sizes(backbone_size: int) -> dict[str, int]:
    """Ranks of injection and output correction, two to one, beside a trained backbone of so many parameters."""
    pair = 2 * WIDTH * INJECTED
    read_out = WIDTH * (2 * 16 + 1 + 2 * 32)
    total = rank_for(BUDGET - backbone_size - read_out, pair)
    return {"injection_hidden_size": total - total // 3, "output_hidden_size": total // 3}


def published_sizes(backbone_size: int) -> dict[str, int]:
    """Rank of the injection and width of the gate, four to one, beside a trained backbone of so many parameters."""
    injection, update = 2 * WIDTH * INJECTED, 4 * WIDTH * (INJECTED - 1)
    left = BUDGET - backbone_size - 2 * WIDTH
    gate = rank_for(left, 4 * injection + update)
    return {"injection_hidden_size": rank_for(left - gate * update, injection), "gate_hidden_size": gate}


def load_shadow() -> Any:
    """The pretrained shadow, fed by the base's embeddings."""
    from transformers import AutoModelForCausalLM

    from shadow_peft import prepare_shadow_model

    model = AutoModelForCausalLM.from_pretrained(shadow_folder(), dtype=torch.float32, local_files_only=True)
    return prepare_shadow_model(model, remove_embed_tokens=True)


def pretrained(variant: str, base: Any, trained: bool) -> Contender:
    """A contender around the pretrained shadow, trained slowly or not at all.

    Raises:
        ValueError: the shadow alone is larger than what may be trained.
    """
    shadow = load_shadow()
    size = sum(p.numel() for p in shadow.parameters()) if trained else 0
    if size > BUDGET * 0.9:
        raise ValueError(f"The pretrained shadow has {size:,} parameters; {BUDGET:,} in all may be trained.")
    sizes = {"readout": readout_sizes, "published": published_sizes}[variant](size)
    fixed: dict[str, Any] = {"alpha": 1.0, "dropout": 0.0} if variant == "published" else {}
    contender = native(base, {"variant": variant, **fixed, **sizes}, OURS_LOSS_WEIGHT if trained else 0.0, shadow)
    if not trained:
        return frozen(contender)
    return replace(contender, backbone=backbone(contender), backbone_rate=PRETRAINED_RATE)


def untrained(variant: str, base: Any) -> Contender:
    """A contender around a random backbone that is not trained."""
    made: Callable[..., Contender] = {"readout": readout, "published": published}[variant]
    sizes = {"readout": readout_sizes, "published": published_sizes}[variant](0)
    return frozen(made(base, shadow_init="random", **sizes))


def readout_only(base: Any) -> Contender:
    """All that is trained between the models goes to the read-out, beside a whole layer."""
    contender = readout(base, shadow_intermediate_size=None, readout_hidden_size=412)
    return without(contender, "shadow_injection_model", "shadow_output_model")


def injection_only(base: Any) -> Contender:
    """Without read-out."""
    contender = readout(base, injection_hidden_size=45, output_hidden_size=22)
    return without(contender, "shadow_readout_model")


def correction_only(base: Any) -> Contender:
    """The output correction alone."""
    contender = readout(base, injection_hidden_size=1, output_hidden_size=67)
    return without(contender, "shadow_injection_model", "shadow_readout_model")


def named(variant: str) -> dict[str, Callable[[Any], Contender]]:
    """The ablations that both variants have."""
    return {
        f"{variant}-pretrained": lambda base: pretrained(variant, base, trained=True),
        f"{variant}-frozen-untrained": lambda base: untrained(variant, base),
        f"{variant}-frozen-pretrained": lambda base: pretrained(variant, base, trained=False),
    }


ABLATIONS: dict[str, Callable[[Any], Contender]] = {
    **named("readout"),
    **named("published"),
    "readout-zero-state": lambda base: readout(base, use_shadow_state=False),
    "published-zero-state": published_without_state,
    "readout-unnormalized": lambda base: readout(base, normalize_injection=False),
    "readout-only": readout_only,
    "readout-injection": injection_only,
    "readout-correction": correction_only,
}
