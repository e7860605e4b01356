"""ShadowSFTTrainer: the model's own loss is what is trained and logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.robot_commands import commands
from shadow_peft.training import ShadowSFTTrainer
from tests.cli.conftest import tiny_tokenizer
from tests.tiny_models import llama
from tests.training.steps import ACCUMULATION, Capture, compare, logits_of, options, scores, small_model, whole_model

KINDS = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 256},
    "packed, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 256},
    "every token": {"completion_only_loss": False},
}


def reference(model: ShadowForCausalLM, rows: list[tuple[list[int], list[int]]], weight: float) -> torch.Tensor:
    """CE(base) + weight * CE(shadow) of sequences and labels, each sequence by itself."""
    total, count = torch.zeros(()), 0
    for ids, labels in rows:
        learned = [i for i in range(1, len(ids)) if labels[i] != -100]
        base, shadow = (-scores(logits, ids, 1)[[i - 1 for i in learned]].sum() for logits in logits_of(model, ids))
        total, count = total + base + weight * shadow, count + len(learned)
    return total / count


def documents(trainer: ShadowSFTTrainer) -> list[tuple[list[int], list[int]]]:
    """The prepared sequences, packed ones taken apart again."""
    rows = []
    for row in trainer.train_dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            part = slice(start, start + length)
            rows.append((row["input_ids"][part], row["labels"][part]))
            start += length
    return rows


@ACCUMULATION
@pytest.mark.parametrize(
    ("kind", "make"), [*((kind, whole_model) for kind in KINDS), ("padded", small_model), ("packed", small_model)]
)
def test_a_step_is_the_step_by_hand(kind: str, make: Any, accumulation: int, tmp_path: Path) -> None:
    model, capture = make(), Capture()
    args = SFTConfig(**options(tmp_path, accumulation, **KINDS[kind]))
    data = Dataset.from_list([c.row() for c in commands("train", 48)])
    trainer = ShadowSFTTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[capture])
    trainer.train_dataset = trainer.train_dataset.select(range(8))  # packed rows, where it packs
    trainer.train()
    rows = documents(trainer)
    assert len(rows) > 8 or kind != "packed"
    compare(
        f"SFT, {kind}, {make.__name__}, accumulation {accumulation}", capture.gradients, model,
        lambda weight: reference(model, rows, weight),
    )  # fmt: skip


def make_model(weight: float = 0.5) -> ShadowForCausalLM:
    torch.manual_seed(0)
    adapted = get_shadow_model(llama(vocab_size=300, eos_token_id=1, bos_token_id=None), ShadowConfig(dropout=0.0))
    return ShadowForCausalLM(adapted, shadow_loss_weight=weight)


def make_trainer(folder: Path, model: ShadowForCausalLM, **options: Any) -> ShadowSFTTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False,
        "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    data = Dataset.from_list([c.row() for c in commands("train", 8)])
    args = SFTConfig(**{**defaults, **options})
    return ShadowSFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer())


def first_batch(trainer: ShadowSFTTrainer) -> dict[str, torch.Tensor]:
    batch = next(iter(trainer.get_eval_dataloader()))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def test_loss_is_the_models_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model())
    batch = first_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).loss
        assert trainer.compute_loss(trainer.model, batch) == expected
        assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7)) != expected


def test_log_splits_the_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(weight=0.5))
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(row["base_loss"] + 0.5 * row["shadow_loss"], rel=1e-4)
    assert "mean_token_accuracy" not in row  # it would need the logits
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_base_loss"] + 0.5 * metrics["eval_shadow_loss"], rel=1e-3)


def test_shadow_weight_changes_what_is_trained(tmp_path: Path) -> None:
    trained = []
    for weight in (0.0, 1.0):
        model = make_model(weight)
        make_trainer(tmp_path, model, learning_rate=1e-2).train()
        trained.append(model.state_dict())
    backbone = [name for name in trained[0] if name.startswith("shadow_model.")]
    assert any(not torch.equal(trained[0][name], trained[1][name]) for name in backbone)


def test_only_completions_are_learned(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model())
    tokenizer = tiny_tokenizer()
    row = trainer.train_dataset[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == commands("train", 1)[0].completion + "<eos>"


def test_model_keeps_its_own_forward(tmp_path: Path) -> None:
    model = make_model()
    make_trainer(tmp_path, model)
    assert "forward" not in vars(model)


def test_refuses_other_models_and_other_losses(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        make_trainer(tmp_path, llama(vocab_size=300))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss_type"):
        make_trainer(tmp_path, make_model(), loss_type="dft")
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(tmp_path, make_model(), label_smoothing_factor=0.1)
