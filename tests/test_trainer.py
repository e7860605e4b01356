"""transformers.Trainer with its default arguments: trains, evaluates, checkpoints, resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from shadow_peft import ShadowForCausalLM, ShadowForSequenceClassification
from tests.test_named_adapters import several
from tests.tiny_models import adapted, causal_lm, classifier, llama, qwen3_classifier, tokens


def rows(count: int = 32) -> list[dict[str, object]]:
    """Texts of different lengths, with a column that no model knows."""
    lengths = torch.randint(3, 12, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [tokens(1, n, seed=i)[0].tolist() for i, n in enumerate(lengths)]
    return [{"input_ids": t, "attention_mask": [1] * len(t), "labels": t, "note": "unused"} for t in texts]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: torch.tensor([row[k] + [v] * (length - len(row[k])) for row in batch]) for k, v in fill.items()}


def arguments(directory: Path, **settings: object) -> TrainingArguments:
    defaults = {
        "max_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return TrainingArguments(directory, **{**defaults, **settings})


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.last: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.last = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_gradients(
    directory: Path, batch: int, accumulation: int, model: ShadowForCausalLM | None = None, **settings: object
) -> dict[str, torch.Tensor]:
    gradients = Gradients()
    model = causal_lm(llama(), shadow_loss_weight=0.5) if model is None else model
    args = arguments(
        directory, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_grad_norm=0, **settings
    )
    Trainer(model, args, train_dataset=rows(), data_collator=collate, callbacks=[gradients]).train()
    return gradients.last


def same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    whole = step_gradients(tmp_path, 16, 1)
    same_gradients(step_gradients(tmp_path, 4, 4), whole)
    same_gradients(step_gradients(tmp_path, 1, 16), whole)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_the_step(reentrant: bool, tmp_path: Path) -> None:
    plain = step_gradients(tmp_path, 8, 1)
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    same_gradients(step_gradients(tmp_path, 8, 1, **settings), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_an_explicit_shadow(reentrant: bool, tmp_path: Path) -> None:
    def fresh() -> ShadowForCausalLM:
        return ShadowForCausalLM(
            adapted(llama(), shadow_model=llama(3, hidden_size=16, num_hidden_layers=2)), shadow_loss_weight=0.5
        )

    plain = step_gradients(tmp_path, 8, 1, fresh())
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    same_gradients(step_gradients(tmp_path, 8, 1, fresh(), **settings), plain)


def test_default_arguments_train_and_evaluate(tmp_path: Path) -> None:
    model = causal_lm(llama())
    args = arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, learning_rate=1e-2)
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows(8), data_collator=collate)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.predict(rows(8)).predictions.shape[-1] == 96, "the adapted base's logits, without the shadow's"


@pytest.mark.parametrize("mode", ["base_shadow", "shadow_only"])
def test_compute_metrics_gets_the_logits_that_answer(tmp_path: Path, mode: str) -> None:
    model = classifier(qwen3_classifier())
    model.set_inference_mode(mode)
    data = [{"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "label": 0} for row in rows(8)]
    data = [{**row, "input_ids": row["input_ids"][:3], "attention_mask": [1] * 3} for row in data]
    seen = []
    trainer = Trainer(
        model,
        arguments(tmp_path),
        eval_dataset=data,
        compute_metrics=lambda p: seen.append(p.predictions) or {"accuracy": 1.0},
    )
    trainer.evaluate()
    expected = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in data]).detach()
    torch.testing.assert_close(torch.as_tensor(seen[0]), expected, rtol=1e-4, atol=1e-5)


def test_the_config_of_a_task_model_is_that_of_its_base() -> None:
    model = causal_lm(llama())
    base = model.peft_model.base_model
    model.config.pad_token_id = 7
    base.config.use_cache = False
    assert base.config.pad_token_id == 7
    assert model.config.use_cache is False
    assert model.config.to_dict() == base.config.to_dict()
    assert isinstance(model.config, type(base.config))
    assert "shadow_logits" not in base.config.keys_to_ignore_at_inference


def run_for_resume(directory: Path, resume: bool, classify: bool = False, steps: int = 6) -> list[float]:
    """One run's losses; saves every second step."""
    torch.manual_seed(0)
    if classify:
        model = classifier(qwen3_classifier(), dropout=0.1)
        data = [{k: v for k, v in row.items() if k != "labels"} | {"label": i % 3} for i, row in enumerate(rows())]
        for row in data:
            row["input_ids"], row["attention_mask"] = row["input_ids"][:3], [1] * 3
        collator = None
    else:
        model, data, collator = (
            causal_lm(llama(), dropout=0.1, modules_to_save=["lm_head", "shadow_lm_head"]),
            rows(),
            collate,
        )
    args = arguments(
        directory, max_steps=steps, save_strategy="steps", save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2
    )
    trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("classify", [False, True])
def test_a_run_resumes_to_the_same_losses(classify: bool, tmp_path: Path) -> None:
    whole = run_for_resume(tmp_path / "whole", resume=False, classify=classify)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    (tmp_path / "cut").mkdir()
    os.rename(checkpoint, tmp_path / "cut" / "checkpoint-4")
    assert run_for_resume(tmp_path / "cut", resume=True, classify=classify) == whole
    base = qwen3_classifier() if classify else llama()
    task = ShadowForSequenceClassification if classify else ShadowForCausalLM
    loaded = task.from_pretrained(base, tmp_path / "cut" / "checkpoint-4")
    assert set(loaded.peft_model.task_heads) == set(task.head_names)


KILLED = """
import sys
from pathlib import Path
from transformers import TrainerCallback
import transformers
import tests.test_trainer as t

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)

original = t.Trainer
t.Trainer = lambda *args, **kwargs: original(*args, callbacks=[Die()], **kwargs)
t.torch.set_num_threads(1)
t.run_for_resume(Path(sys.argv[1]), resume=False)
"""


def test_a_killed_run_resumes_to_the_same_losses(tmp_path: Path) -> None:
    whole = run_for_resume(tmp_path / "whole", resume=False)
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], cwd=root, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert run_for_resume(tmp_path / "killed", resume=True)[-2:] == whole[-2:]


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = causal_lm(llama())
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, max_steps=3, learning_rate=10.0, load_best_model_at_end=True, **settings)
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows(8), data_collator=collate)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def with_readout() -> ShadowForCausalLM:
    """Two adapters, of which the second is active."""
    model = several(names=("readout",))
    model.set_adapter("readout")
    return model


def test_the_active_adapter_is_trained_and_resumed(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    model = with_readout()
    waiting = {name: p.clone() for name, p in model.peft_model.adapter("default").named_parameters()}
    Trainer(model, arguments(tmp_path, **settings), train_dataset=rows(), data_collator=collate).train()
    resumed = with_readout()
    trainer = Trainer(resumed, arguments(tmp_path, **settings), train_dataset=rows(), data_collator=collate)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)
    assert not torch.equal(
        model.state_dict()["shadow_readout_model.up"], with_readout().state_dict()["shadow_readout_model.up"]
    )
    still = dict(model.peft_model.adapter("default").named_parameters())
    assert all(torch.equal(still[name], p) for name, p in waiting.items())


def test_batches_of_several_adapters_are_trained(tmp_path: Path) -> None:
    """A column `adapter_names` of the dataset says whose each row is."""
    data = [{**row, "adapter_names": ("default", "readout", "__base__")[i % 3]} for i, row in enumerate(rows(6))]
    gradients = Gradients()
    model = with_readout()
    model.peft_model.set_requires_grad(["default", "readout"])
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=6, max_grad_norm=0),
        train_dataset=data,
        data_collator=lambda batch: {**collate(batch), "adapter_names": [row["adapter_names"] for row in batch]},
        callbacks=[gradients],
    )
    trainer.train()
    assert {name.split(".")[1] for name in gradients.last} >= {"shadow_readout_model", "other_adapters"}


def test_a_classifiers_loss_does_not_depend_on_what_it_returns() -> None:
    model = classifier(qwen3_classifier()).train()
    labels = torch.tensor([0, 2, 1])
    whole, lean = (model(tokens(), labels=labels, output_shadow_logits=wanted) for wanted in (True, False))
    assert torch.equal(lean.loss, whole.loss)
    assert lean.shadow_logits is None
    assert whole.shadow_logits is not None
