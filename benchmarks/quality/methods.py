"""The contenders, each with about as many trained parameters as the demo's shadow and what couples it to its base.

A contender is a model that returns `loss` where labels are given, and a way to ask it for the logits of the attached model
and of the shadow. `ours` needs this library, `shadow-peft-0.1.1` the published package of the same name; the others `peft`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.quality.scoring import Inputs, Logits

BUDGET, TOLERANCE = 950_000, 0.03
LORA_RANK = 34
OURS: dict[str, Any] = {
    "variant": "readout", "num_shadow_layers": 2, "shadow_init_layers": "even", "shadow_intermediate_size": 480,
    "injection_hidden_size": 38, "output_hidden_size": 20,
}  # fmt: skip
PRETRAINED: dict[str, Any] = {"variant": "readout", "injection_hidden_size": 38, "output_hidden_size": 20}
PRETRAINED_RATE = 0.3
OURS_LOSS_WEIGHT = 0.5
MIXED: dict[str, Any] = {
    "variant": "readout", "shadow_intermediate_size": 384, "injection_hidden_size": 35, "output_hidden_size": 12,
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A model to train, how to read it, and the part of it, if any, that is trained at a rate of its own."""

    model: nn.Module
    logits: Logits
    backbone: nn.Module | None = None
    backbone_rate: float = 1.0

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Optimizer groups: the backbone at `backbone_rate` times the rate of all else."""
        slow = {id(p) for p in self.backbone.parameters()} if self.backbone is not None else set()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if (id(p) in slow) == is_slow], "lr": rate * factor}
            for is_slow, factor in ((False, 1.0), (True, self.backbone_rate))
        ]
        return [group for group in groups if group["params"]]

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def attached_only(model: nn.Module) -> Logits:
    """Logits of a model without a shadow."""
    return lambda inputs: (model(**inputs).logits, None)


def lora(base: PreTrainedModel, **options: Any) -> Contender:
    """LoRA on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    sizes = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**{**sizes, **options}))
    return Contender(model, attached_only(model))


def rslora(base: PreTrainedModel) -> Contender:
    """LoRA with the scale alpha / sqrt(r)."""
    return lora(base, use_rslora=True, lora_alpha=16)


def dora(base: PreTrainedModel) -> Contender:
    """LoRA with trained magnitudes, which cost about one rank."""
    return lora(base, use_dora=True)


def peft_shadow(base: PreTrainedModel) -> Contender:
    """peft's Shadow tuner with two layers and rank 16; all else its defaults."""
    from peft import ShadowConfig, get_peft_model

    model = get_peft_model(base, ShadowConfig(r=16, shadow_num_hidden_layers=2, task_type="CAUSAL_LM"))

    def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
        tuner = model.base_model
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        state = tuner.shadow_backbone["default"](inputs_embeds=embeds, attention_mask=inputs["attention_mask"])[0]
        return model(**inputs).logits, model.get_output_embeddings()(tuner.shadow_projection["default"](state))

    return Contender(model, logits)


def published(base: PreTrainedModel) -> Contender:
    """shadow-peft 0.1.1 with two layers and rank 34; all else its defaults."""
    return native(base, {"num_shadow_layers": 2, "injection_hidden_size": 34}, {})


def ours(base: PreTrainedModel) -> Contender:
    """This library's defaults for new adapters, with two layers of a little fewer neurons, to fit the budget."""
    return native(base, OURS, {"shadow_loss_weight": OURS_LOSS_WEIGHT})


def ours_pretrained(base: PreTrainedModel) -> Contender:
    """This library around the demo's shadow, which was pretrained on the base's own text and is trained more slowly."""
    from shadow_peft.demo.embedded import load_shadow

    shadow = load_shadow()
    contender = native(base, PRETRAINED, {"shadow_loss_weight": OURS_LOSS_WEIGHT}, shadow)
    return replace(contender, backbone=shadow, backbone_rate=PRETRAINED_RATE)


def ours_with_lora(base: PreTrainedModel) -> Contender:
    """This library and LoRA inside the base, trained together, half of the budget each."""
    from peft import LoraConfig, inject_adapter_in_model

    contender = native(base, MIXED, {"shadow_loss_weight": OURS_LOSS_WEIGHT})
    rank = LORA_RANK // 2
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear_maps(base)), base)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return contender


def linear_maps(base: PreTrainedModel) -> list[str]:
    """Names of every linear layer but the head."""
    head = base.get_output_embeddings()
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head]


def native(
    base: PreTrainedModel, config: dict[str, Any], task: dict[str, Any], shadow: PreTrainedModel | None = None
) -> Contender:
    """A shadow by the names that both versions of the package have."""
    from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

    model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(**config), shadow_model=shadow), **task)

    def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
        outputs = model(**inputs)
        return outputs.logits, outputs.shadow_logits

    return Contender(model, logits)


METHODS: dict[str, Callable[[PreTrainedModel], Contender]] = {
    "lora": lora,
    "rslora": rslora,
    "dora": dora,
    "peft-shadow": peft_shadow,
    "shadow-peft-0.1.1": published,
    "ours": ours,
    "ours-pretrained": ours_pretrained,
    "ours+lora": ours_with_lora,
}


def build(method: str, base: PreTrainedModel, seed: int) -> Contender:
    """A fresh contender on a base that is its own."""
    torch.manual_seed(seed)
    contender = METHODS[method](base)
    if abs(contender.trainable / BUDGET - 1) > TOLERANCE:
        raise ValueError(f"{method} trains {contender.trainable:,} parameters, not {BUDGET:,} within {TOLERANCE:.0%}.")
    return contender
