"""Every trainer on a quantized base: a step's gradients; saved, reloaded, resumed, exported; and the base's bits stay.

A step is compared with that of the same model on the base that the quantized weights mean, in floats. `u` is the unit
roundoff of the dtype that the base computes in. An activation of the base goes through P linear maps forwards and as many
backwards, whose rounding errors are independent; each rounds a sum of K products, K times in float32, and once in bfloat16,
where kernels sum in float32. So the gradients of a part differ by about `u * sqrt(2 * P * K)`; twice that is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, GRPOConfig, RewardConfig, RewardTrainer, SFTConfig

from shadow_peft import ShadowForCausalLM, ShadowForSequenceClassification
from shadow_peft.demo.robot_commands import commands
from shadow_peft.tasks.base import TRAINER_TAG
from shadow_peft.training import (
    ShadowDPOTrainer,
    ShadowGRPOTrainer,
    ShadowRewardTrainer,
    ShadowSFTTrainer,
    ShadowTrainer,
    ShadowTrainerMixin,
)
from tests.cli.conftest import tiny_tokenizer
from tests.quantized_bases import (
    KINDS,
    SIZES,
    WORDS,
    assert_same_bits,
    dequantized,
    frozen_bits,
    load,
    need,
    save_base,
    settings,
)
from tests.test_trainer import collate, rows
from tests.tiny_models import adapted, llama, qwen3_classifier, tokens
from tests.training.steps import Capture, Gradients, error, options

pytestmark = pytest.mark.filterwarnings("ignore")  # these packages have warnings of their own

MAPS = 7 * SIZES["num_hidden_layers"]
TERMS = SIZES["intermediate_size"]


#: In evaluation 8 bit of bitsandbytes rounds activations to 1 / 127 of a token's largest, too.
ROUNDING = {"bitsandbytes 8": 0.1}


def tolerance(dtype: torch.dtype) -> float:
    terms = TERMS if dtype == torch.float32 else 1
    return 2 * torch.finfo(dtype).eps / 2 * math.sqrt(2 * MAPS * terms)


def pairs() -> Dataset:
    right, wrong = commands("train", 4), commands("train", 8)[4:]
    return Dataset.from_list(
        [{"prompt": r.prompt, "chosen": r.completion, "rejected": w.completion} for r, w in zip(right, wrong, strict=True)]
    )


def texts() -> Dataset:
    return Dataset.from_list([c.row() for c in commands("train", 4)])


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": c.prompt[:20]} for c in commands("train", 2)])


def lengths(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(ids) / 100 for ids in completion_ids]


def stock(model: Any, folder: Path, kind: type = Trainer, **more: Any) -> Any:
    given = options(folder, rows=4, **more)
    callbacks = given.pop("callbacks")
    return kind(model, TrainingArguments(**given), train_dataset=rows(8), data_collator=collate, callbacks=callbacks)


def shadow(model: Any, folder: Path, **more: Any) -> Any:
    return stock(model, folder, ShadowTrainer, **more)


def sft(model: Any, folder: Path, **more: Any) -> Any:
    given = options(folder, rows=4, **more)
    callbacks, held_out = given.pop("callbacks"), texts() if more.get("eval_strategy") else None
    return ShadowSFTTrainer(
        model, SFTConfig(**given), train_dataset=texts(), eval_dataset=held_out, processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip


def dpo(model: Any, folder: Path, **more: Any) -> Any:
    given = options(folder, rows=4, **more)
    callbacks = given.pop("callbacks")
    return ShadowDPOTrainer(
        model, args=DPOConfig(**given), train_dataset=pairs(), processing_class=tiny_tokenizer(), callbacks=callbacks
    )


def grpo(model: Any, folder: Path, **more: Any) -> Any:
    given = options(folder, rows=4, num_generations=2, max_completion_length=4, beta=0.1, **more)
    callbacks = given.pop("callbacks")
    return ShadowGRPOTrainer(
        model, lengths, GRPOConfig(**given), train_dataset=prompts(), processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip


def reward(model: Any, folder: Path, **more: Any) -> Any:
    given = options(folder, rows=4, **more)
    callbacks = given.pop("callbacks")
    return ShadowRewardTrainer(
        model, RewardConfig(**given), train_dataset=pairs(), processing_class=tiny_tokenizer(), callbacks=callbacks
    )


TRAINERS: dict[str, Callable[..., Any]] = {
    "Trainer": stock, "ShadowTrainer": shadow, "SFT": sft, "DPO": dpo, "GRPO": grpo, "reward": reward,
}  # fmt: skip


def wrapped(base: PreTrainedModel, **config: Any) -> Any:
    """A task model with a backbone that does not depend on the base's rounding."""
    if hasattr(base, "score"):
        shadow_model = qwen3_classifier(5, **{**SIZES, **WORDS, "num_hidden_layers": 1}).model
        return ShadowForSequenceClassification(adapted(base, shadow_model=shadow_model, **config), shadow_loss_weight=0.5)
    shadow_model = llama(5, **{**SIZES, **WORDS, "num_hidden_layers": 1})
    return ShadowForCausalLM(adapted(base, shadow_model=shadow_model, **config), shadow_loss_weight=0.5)


def step(name: str, model: Any, folder: Path, **more: Any) -> Gradients:
    capture = Capture()
    TRAINERS[name](model, folder, callbacks=[capture], **more).train()
    return capture.gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_is_that_of_the_dequantized_base(name: str, kind: str, tmp_path: Path) -> None:
    need(kind)
    is_reward = name == "reward"
    folder = save_base(tmp_path / "base", is_reward)
    base = load(folder, kind, classifier=is_reward)
    before, model = frozen_bits(base), wrapped(base)
    found = step(name, model, tmp_path / "out")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = step(name, wrapped(dequantized(folder, kind, classifier=is_reward)), tmp_path / "plain")
    assert error(found, expected) < tolerance(torch.float32)
    TRAINERS[name](model, tmp_path / "out", callbacks=[], learning_rate=1e-2, max_steps=2).train()
    assert model.peft_model.unload() is base
    assert_same_bits(frozen_bits(base), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_that_computes_in_bfloat16(checkpointing: bool, kind: str, tmp_path: Path) -> None:
    need(kind)
    folder = save_base(tmp_path / "base")
    model = wrapped(load(folder, kind, torch.bfloat16))
    found = step("SFT", model, tmp_path / "out", activation_checkpointing=checkpointing)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = step("SFT", wrapped(dequantized(folder, kind, torch.bfloat16)), tmp_path / "plain")
    assert error(found, expected) < tolerance(torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
def test_floats_beside_weights_that_compute_in_bfloat16(autocast: bool, tmp_path: Path) -> None:
    """QLoRA's own setting, and autocast, on a base whose other parameters are float32."""
    need("bitsandbytes 4")
    folder = save_base(tmp_path / "base")
    quantization = settings("bitsandbytes 4", torch.float32 if autocast else torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    found = step("SFT", wrapped(base), tmp_path / "out", bf16=autocast)
    expected = step("SFT", wrapped(dequantized(folder, "bitsandbytes 4")), tmp_path / "plain", bf16=autocast)
    assert error(found, expected) < tolerance(torch.bfloat16)


def test_an_optimizer_of_8_bits(tmp_path: Path) -> None:
    need("bitsandbytes 4")
    model = wrapped(load(save_base(tmp_path / "base"), "bitsandbytes 4"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sft(model, tmp_path / "out", callbacks=[], optim="paged_adamw_8bit", learning_rate=1e-2).train()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("shadow_model.") for name in changed)
    assert any(not name.startswith("shadow_model.") for name in changed)


class MixedRewardTrainer(ShadowTrainerMixin, RewardTrainer):
    """TRL's own trainer, with what ours add."""

    _tag_names = [*RewardTrainer._tag_names, TRAINER_TAG]  # noqa: RUF012


def test_trl_itself_rounds_the_adapter_and_is_refused(tmp_path: Path) -> None:
    """Without a shadow loss it may train the base path, but not in bfloat16 where float32 was chosen."""
    need("bitsandbytes 4")
    folder, args = save_base(tmp_path / "base", True), RewardConfig(**options(tmp_path, rows=4))
    for kind in (RewardTrainer, MixedRewardTrainer):
        model = wrapped(load(folder, "bitsandbytes 4", classifier=True))
        model.shadow_loss_weight = 0.0
        if kind is RewardTrainer:
            with pytest.raises(TypeError, match="rounded the adapter to bfloat16"):
                kind(model, args, train_dataset=pairs(), processing_class=tiny_tokenizer())
        else:
            kind(model, args, train_dataset=pairs(), processing_class=tiny_tokenizer()).train()
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Trainer", "SFT", "reward"])
def test_gradient_checkpointing_does_not_change_the_step(name: str, kind: str, tmp_path: Path) -> None:
    need(kind)
    folder = save_base(tmp_path / "base", name == "reward")
    model = wrapped(load(folder, kind, classifier=name == "reward"))
    plain = step(name, model, tmp_path / "out")
    again = step(name, model, tmp_path / "out", activation_checkpointing=True)
    assert error(again, plain) < 1e-5


def run(base: PreTrainedModel, folder: Path, checkpoint: Path | None = None) -> ShadowForCausalLM:
    """Four steps with an evaluation after every second one, on a backbone cut from the base."""
    model = ShadowForCausalLM(adapted(base, variant="readout"), shadow_loss_weight=0.5)
    more: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = sft(model, folder, callbacks=[], learning_rate=1e-3, optim="adamw_torch", max_steps=4, **more)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_saved_reloaded_resumed_and_exported(kind: str, tmp_path: Path) -> None:
    need(kind)
    folder, ids = save_base(tmp_path / "base"), tokens(length=12)
    base = load(folder, kind)
    before = frozen_bits(base)
    model = run(base, tmp_path / "out").eval()
    assert_same_bits(frozen_bits(base), before)

    resumed = run(load(folder, kind), tmp_path / "again", tmp_path / "out" / "checkpoint-2").eval()
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(ids)
        reloaded = ShadowForCausalLM.from_pretrained(load(folder, kind), tmp_path / "adapter", is_trainable=True).eval()
        assert torch.equal(reloaded(ids).logits, expected.logits)
        on_floats = ShadowForCausalLM.from_pretrained(load(folder, None), tmp_path / "adapter")
        # embeddings and head are not quantized, so the shadow alone says the same
        assert torch.allclose(on_floats(ids).shadow_logits, expected.shadow_logits, atol=1e-5)
        assert not torch.allclose(on_floats(ids).logits, expected.logits, atol=1e-3)  # the weights that were rounded
        same = ShadowForCausalLM.from_pretrained(dequantized(folder, kind), tmp_path / "adapter")
        assert torch.allclose(same(ids).logits, expected.logits, atol=ROUNDING.get(kind, 1e-4) * expected.logits.abs().max())

        model.export_shadow().save_pretrained(tmp_path / "small")
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert {type(p) for p in small.parameters()} == {torch.nn.Parameter}
        assert torch.allclose(small(ids).logits, expected.shadow_logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["bitsandbytes 4", "bitsandbytes 8"])
@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "SFT"])  # the test above has it
def test_every_trainer_saves_reloads_resumes_and_exports(name: str, kind: str, tmp_path: Path) -> None:
    need(kind)
    is_reward, ids = name == "reward", tokens(length=12)
    folder = save_base(tmp_path / "base", is_reward)
    more: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    if name == "GRPO":
        more["shuffle_dataset"] = False

    def trainer_in(out: str) -> Any:
        model = wrapped(load(folder, kind, classifier=is_reward))
        return TRAINERS[name](model, tmp_path / out, callbacks=[], **more, optim="adamw_torch")

    trainer, resumed = trainer_in("out"), trainer_in("again")
    model = trainer.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if "layers" in key)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key

    trainer.save_model(str(tmp_path / "adapter"))
    base = load(folder, kind, classifier=is_reward)
    reloaded = type(model).from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    model.eval().export_shadow().save_pretrained(tmp_path / "small")
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(reloaded(ids).logits, expected.logits)
        small = auto.from_pretrained(tmp_path / "small")(ids).logits
        assert torch.allclose(small, expected.shadow_logits, atol=1e-5)
