"""The contenders on the real base, each with 3 % of the base's parameters trained; the sizes are asserted when one is built.

Beside a base in bfloat16 every trained parameter is float32. Adapters of `peft` and of this library mix the two by
themselves. The two published shadows do not: they run under autocast to bfloat16 (`AUTOCAST`), which is what a trainer's
`bf16=True` is. Dropout is 0 everywhere but in the published shadows, whose defaults it is part of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.quality.methods import Contender, attached_only
from benchmarks.quality.real.packages import ROOT, cache
from benchmarks.quality.scoring import Inputs

BASE_PARAMETERS = 134_515_008
SHARE, TOLERANCE = 0.03, 0.01
BUDGET = round(SHARE * BASE_PARAMETERS)
WIDTH, INJECTED = 576, 29
AUTOCAST = ("peft-shadow", "shadow-peft-0.1.1")
PUBLISHED_LOSS_WEIGHT, OURS_LOSS_WEIGHT = 0.05, 0.5
PRETRAINED_RATE = 0.3

READOUT: dict[str, Any] = {
    "variant": "readout", "shadow_init": "base", "shadow_intermediate_size": 512,
    "injection_hidden_size": 44, "output_hidden_size": 22,
}  # fmt: skip
PUBLISHED: dict[str, Any] = {
    "variant": "published", "shadow_init": "base", "shadow_intermediate_size": 512, "alpha": 1.0, "dropout": 0.0,
    "injection_hidden_size": 44, "gate_hidden_size": 12,
}  # fmt: skip


def upper_half(base: Any) -> range:
    """The layers that the contenders named `-upper` adapt; nothing below them has to be gone back through."""
    count = base.config.num_hidden_layers
    return range(count // 2, count)


def task_type(base: Any) -> str:
    """The task of a base, as `peft` names it."""
    return "SEQ_CLS" if hasattr(base, "score") else "CAUSAL_LM"


def lora(base: Any, **options: Any) -> Contender:
    """LoRA on every linear layer but the head; one rank more or less in the last map of each layer makes the size fit."""
    from peft import LoraConfig, get_peft_model

    rank, last = options.pop("ranks", (13, 14))
    config = {
        "r": rank, "lora_alpha": 2 * rank, "rank_pattern": {"down_proj": last}, "alpha_pattern": {"down_proj": 2 * last},
        "target_modules": "all-linear", "task_type": task_type(base),
    }  # fmt: skip
    model = get_peft_model(base, LoraConfig(**{**config, **options}))
    return Contender(model, attached_only(model))


def rslora(base: Any) -> Contender:
    """LoRA with the scale alpha / sqrt(r), alpha 16."""
    return lora(base, use_rslora=True, lora_alpha=16, alpha_pattern={})


def dora(base: Any) -> Contender:
    """LoRA with trained magnitudes, which cost about half a rank."""
    return lora(base, use_dora=True, ranks=(13, 12))


def lora_upper(base: Any) -> Contender:
    """LoRA of twice the rank on the upper half of the layers."""
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # peft wants a list here
    return lora(base, ranks=(26, 28), target_modules=linears, layers_to_transform=list(upper_half(base)))


def lily(base: Any) -> Contender:
    """LILY of `peft`: up projections shared by all layers and mixed by a router."""
    from peft import LilyConfig, get_peft_model

    config = LilyConfig(r=39, stride_A=3, num_B=10, target_modules="all-linear", task_type=task_type(base))
    model = get_peft_model(base, config)
    return Contender(model, attached_only(model))


def peft_shadow(base: Any) -> Contender:
    """peft's Shadow tuner at our size; all else its defaults."""
    from peft import ShadowConfig, get_peft_model

    config = ShadowConfig(r=32, update_hidden_size=16, shadow_intermediate_size=512, task_type=task_type(base))
    model = get_peft_model(base, config)

    def logits(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        if task_type(base) == "SEQ_CLS":
            return model(**inputs).logits, None
        tuner = model.base_model
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        state = tuner.shadow_backbone["default"](inputs_embeds=embeds, attention_mask=inputs["attention_mask"])[0]
        return model(**inputs).logits, model.get_output_embeddings()(tuner.shadow_projection["default"](state))

    return Contender(model, logits)


def published_package(base: Any) -> Contender:
    """shadow-peft 0.1.1 at our size; all else its defaults."""
    sizes = {"shadow_intermediate_size": 512, "injection_hidden_size": 44, "gate_hidden_size": 12}
    return native(base, sizes, PUBLISHED_LOSS_WEIGHT)


def readout(base: Any, **config: Any) -> Contender:
    """Our variant `readout`, its shadow the base's first layer with a third of its MLP."""
    return native(base, {**READOUT, **config}, OURS_LOSS_WEIGHT)


def readout_upper(base: Any) -> Contender:
    """`readout` with twice the ranks on the upper half of the layers."""
    return readout(base, first_injected_layer=upper_half(base)[0], injection_hidden_size=88, output_hidden_size=40)


def published(base: Any, **config: Any) -> Contender:
    """Our variant `published` with alpha 1 and without dropout, around the same shadow."""
    return native(base, {**PUBLISHED, **config}, OURS_LOSS_WEIGHT)


def shadow_folder() -> Path:
    """The pretrained shadow: one that `make gpu` made, else the committed one."""
    made = cache() / "smollm2-shadow"
    return made if made.exists() else ROOT / "examples/shadows/smollm2-135m-instruct"


def native(base: Any, config: dict[str, Any], loss_weight: float, shadow: Any = None) -> Contender:
    """A shadow by the names that both versions of the package have."""
    import shadow_peft

    kind = "ShadowForSequenceClassification" if task_type(base) == "SEQ_CLS" else "ShadowForCausalLM"
    adapted = shadow_peft.get_shadow_model(base, shadow_peft.ShadowConfig(**config), shadow_model=shadow)
    model = getattr(shadow_peft, kind)(adapted, shadow_loss_weight=loss_weight)

    def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
        outputs = model(**inputs)
        return outputs.logits, outputs.shadow_logits

    return Contender(model, logits)


METHODS: dict[str, Callable[[Any], Contender]] = {
    "lora": lora,
    "lora-upper": lora_upper,
    "rslora": rslora,
    "dora": dora,
    "lily": lily,
    "peft-shadow": peft_shadow,
    "shadow-peft-0.1.1": published_package,
    "readout": readout,
    "readout-upper": readout_upper,
    "published": published,
}


def backbone(contender: Contender) -> nn.Module:
    """The shadow backbone of one of our contenders."""
    model: Any = contender.model
    return model.peft_model.shadow_model
