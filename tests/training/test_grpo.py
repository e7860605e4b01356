"""ShadowGRPOTrainer: GRPO of the adapted base, which generates; the shadow is distilled on what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from shadow_peft import ShadowForCausalLM
from shadow_peft.demo.robot_commands import commands
from shadow_peft.training import ShadowGRPOTrainer
from tests.cli.conftest import tiny_tokenizer
from tests.tiny_models import llama
from tests.training.steps import ACCUMULATION, TRL_NAMES, Capture, compare, options, scores, whole_model

pytestmark = TRL_NAMES
GROUP = 4


class Judge:
    """Rewards completions by their tokens, and remembers them."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[int], float]] = []

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        rewards = [sum(ids) / 100 for ids in completion_ids]
        self.seen += list(zip(prompts, completion_ids, rewards, strict=True))
        return rewards


def make_trainer(folder: Path, model: Any, judge: Judge, accumulation: int = 1, **more: Any) -> ShadowGRPOTrainer:
    callbacks = more.pop("callbacks", None)
    data = Dataset.from_list([{"prompt": c.prompt[: 20 + 5 * i]} for i, c in enumerate(commands("train", 4))])
    settings = {"num_generations": GROUP, "max_completion_length": 6, "temperature": 0.8, **more}
    args = GRPOConfig(**options(folder, accumulation, **settings))
    return ShadowGRPOTrainer(model, judge, args, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=callbacks)


def reference(model: ShadowForCausalLM, judge: Judge, weight: float, beta: float, temperature: float = 0.8) -> torch.Tensor:
    """-advantage * log p + beta * k3 + weight * KL(p || shadow), a mean over the tokens of all completions."""
    tokenizer, total, count = tiny_tokenizer(), torch.zeros(()), 0
    for first in range(0, len(judge.seen), GROUP):
        group = judge.seen[first : first + GROUP]
        rewards = torch.tensor([reward for _, _, reward in group])
        for (prompt, completion, _), advantage in zip(
            group, (rewards - rewards.mean()) / (rewards.std() + 1e-4), strict=True
        ):
            start = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(prompt)["input_ids"] + completion
            output = model(input_ids=torch.tensor([ids]))
            policy, shadow = output.logits[0] / temperature, output.shadow_logits[0] / temperature
            with torch.no_grad():
                bare = model.peft_model.get_base_model()(input_ids=torch.tensor([ids])).logits[0] / temperature
            chosen = scores(policy, ids, start)
            lead = scores(bare, ids, start) - chosen
            k3 = (lead.exp() - lead - 1) * (chosen - chosen.detach()).exp()  # with the importance weight, TRL's default
            p, q = (logits[start - 1 : -1].log_softmax(-1) for logits in (policy.detach(), shadow))
            total = total - (advantage * chosen).sum() + beta * k3.sum()
            total = total + weight * (p.exp() * (p - q)).sum()
            count += len(completion)
    return total / count


def policy(**config: Any) -> ShadowForCausalLM:
    """A model that ends its completions at one of many tokens, so that they differ in length."""
    model = whole_model(**config)
    model.generation_config.eos_token_id = list(range(1, 60))
    return model


@ACCUMULATION
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_a_step_is_the_step_by_hand(beta: float, accumulation: int, tmp_path: Path) -> None:
    model, capture, judge = policy(), Capture(), Judge()
    make_trainer(tmp_path, model, judge, accumulation, beta=beta, callbacks=[capture]).train()
    assert len(judge.seen) == 8
    assert len({len(ids) for _, ids, _ in judge.seen}) > 1
    compare(
        f"GRPO, beta {beta}, accumulation {accumulation}", capture.gradients, model,
        lambda weight: reference(model, judge, weight, beta),
    )  # fmt: skip


def test_the_adapted_base_generates(tmp_path: Path) -> None:
    model, judge = policy(), Judge()
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    make_trainer(tmp_path, model, judge, generation_kwargs=greedy).train()
    model.eval()
    for prompt, completion, _ in judge.seen[::GROUP]:
        ids = tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"]
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        written = model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
        assert written[: len(completion)] == completion
    bare = model.peft_model.get_base_model()
    assert bare.generate(ids, eos_token_id=list(range(1, 60)), **settings)[0, ids.shape[1] :].tolist() != written


def test_no_second_base_is_loaded(tmp_path: Path) -> None:
    model = policy()
    trainer = make_trainer(tmp_path, model, Judge(), beta=0.1)
    assert (trainer.beta, trainer.args.beta) == (0.1, 0.1)
    assert not list(trainer.ref_model.parameters())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 4, "beta": 0.1}], ids=["defaults", "off policy"])
def test_trains_evaluates_and_logs_both_losses(settings: dict[str, Any], tmp_path: Path) -> None:
    common = {"learning_rate": 1e-2, "max_steps": 2, "bf16": None, "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, policy(dropout=0.1), Judge(), 2, **common, **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "base_loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["loss"] == pytest.approx(row["base_loss"] + 0.5 * row["shadow_loss"], rel=2e-2, abs=1e-5)
        assert row["shadow_loss"] > 0
    metrics = trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_base_loss"] + 0.5 * metrics["eval_shadow_loss"], abs=1e-3)


@pytest.mark.parametrize("option", ["use_transformers_continuous_batching", "cast_lm_head_to_fp32", "sync_ref_model"])
def test_refuses_what_it_cannot_honour(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=option):
        make_trainer(tmp_path, policy(), Judge(), **{option: True})


def test_refuses_other_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        make_trainer(tmp_path, llama(), Judge())
    alone = policy()
    alone.set_inference_mode("shadow_only")
    with pytest.raises(ValueError, match="set_inference_mode"):
        make_trainer(tmp_path, alone, Judge())
