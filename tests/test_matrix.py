"""One matrix: what holds for every variant, both task models and three layouts of a base.

A new variant, task model or layout enters it by a name in VARIANTS, TASKS, or BASES and CLASSIFIERS of tiny_models.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, get_shadow_model
from shadow_peft.config import Variant
from tests.tiny_models import BASES, CLASSIFIERS, adapted, tokens

VARIANTS = get_args(Variant)
TASKS: dict[str, tuple[type, dict[str, Callable[[], PreTrainedModel]]]] = {
    "causal LM": (ShadowForCausalLM, BASES),
    "classifier": (ShadowForSequenceClassification, CLASSIFIERS),
}
HALF = (torch.bfloat16, torch.float16)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    variant: Variant
    task: str
    layout: str

    def __str__(self) -> str:
        return f"{self.variant}-{self.task}-{self.layout}"

    @property
    def task_class(self) -> Any:
        return TASKS[self.task][0]

    def base(self) -> PreTrainedModel:
        """The same random base each time, in eval mode."""
        return TASKS[self.task][1][self.layout]()

    def model(self, base: PreTrainedModel | None = None, seed: int = 1, **config: object) -> Any:
        """A task model whose adapter and heads are not as they were drawn, in eval mode; the seed chooses the weights."""
        peft_model = adapted(self.base() if base is None else base, seed=seed, variant=self.variant, **config)
        peft_model.shadow_injection_model.injection_ups.data.mul_(seed)
        model = self.task_class(peft_model, shadow_loss_weight=0.5)
        for factor, head in enumerate(peft_model.task_heads.values(), start=seed + 1):
            head.weight.data.mul_(factor)
        return model

    def labels(self, ids: Tensor) -> Tensor:
        """Targets, some of them missing."""
        if self.task == "classifier":
            return torch.tensor([2, -100, 0, 1])[: len(ids)]
        labels = ids.clone()
        labels[0, 4:] = labels[1] = -100
        return labels

    def num_items(self, labels: Tensor) -> Tensor:
        """Targets that are there, as a trainer counts them."""
        return (labels if self.task == "classifier" else labels[:, 1:]).ne(-100).sum()


CASES = [Case(*parts) for parts in itertools.product(VARIANTS, TASKS, BASES)]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)
LANGUAGE = pytest.mark.parametrize("case", [case for case in CASES if case.task == "causal LM"], ids=str)


@torch.no_grad()
def outputs_of(model: Any, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of base and shadow."""
    outputs = model(tokens() if ids is None else ids)
    return outputs.logits, outputs.shadow_logits


def same(one: Any, other: Any) -> bool:
    """Whether two models compute the same, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(outputs_of(one), outputs_of(other), strict=True))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_dropout(model: nn.Module) -> Any:
    """The model itself, in which GPT-2's own dropout drops nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# ---------------------------------------------------------------- the base stays as it is


@EVERY
def test_a_fresh_adapter_changes_nothing(case: Case) -> None:
    base = case.base()
    expected = base(tokens()).logits
    model = case.task_class(get_shadow_model(base, ShadowConfig(variant=case.variant))).eval()
    assert torch.equal(outputs_of(model)[0], expected)


@EVERY
def test_disable_adapter_and_unload_give_the_base_bit_for_bit(case: Case) -> None:
    base, ids = case.base(), tokens(4)
    expected, trainable = base(ids).logits, [p.requires_grad for p in base.parameters()]
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = case.model(base)
    assert not torch.allclose(outputs_of(model, ids)[0], expected, atol=1e-3)
    model(ids, labels=case.labels(ids)).loss.backward()
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model.peft_model(ids).logits, expected)
        if case.task == "causal LM":  # a classifier answers with its own head
            assert torch.equal(model(ids).logits, expected)
    assert torch.equal(base(ids).logits, expected)
    assert model.peft_model.unload() is base
    assert torch.equal(base(ids).logits, expected)
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


# ---------------------------------------------------------------- training


@EVERY
def test_gradients_reach_every_trainable_parameter(case: Case) -> None:
    model, ids = case.model().train(), tokens(4)
    model(ids, labels=case.labels(ids)).loss.backward()
    assert not [name for name, p in trained(model).items() if p.grad is None or not p.grad.any()]
    assert all(p.grad is None for p in model.peft_model.base_model.parameters())


@EVERY
def test_the_loss_does_not_depend_on_gradient_accumulation(case: Case) -> None:
    model, ids = without_dropout(case.model()).train(), tokens(4)
    labels = case.labels(ids)

    def step(pieces: int) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for rows, targets in zip(ids.chunk(pieces), labels.chunk(pieces), strict=True):
            part = model(rows, labels=targets, num_items_in_batch=case.num_items(labels)).loss
            part.backward()
            loss += part.detach()
        return loss, {name: p.grad for name, p in trained(model).items()}

    (expected, whole), (found, summed) = step(1), step(4)
    torch.testing.assert_close(found, expected)
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@EVERY
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_half_precision_base_with_a_float32_adapter(case: Case, dtype: torch.dtype) -> None:
    exact, model, ids = case.model(), case.model(case.base().to(dtype)), tokens(4)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    model(ids, labels=case.labels(ids)).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())
    for found, expected in zip(outputs_of(model), outputs_of(exact), strict=True):
        assert found.dtype == (torch.float32 if case.task == "classifier" else dtype)
        assert (found.float() - expected).abs().max() < 0.08 * expected.abs().max()


# ---------------------------------------------------------------- what a call computes


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_computes_what_it_computes_alone(case: Case, side: str) -> None:
    model, rows = case.model(), [tokens(1, length, seed=length)[0] for length in (4, 9, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        for name, alone in zip(("logits", "shadow_logits"), outputs_of(model, row[None]), strict=True):
            found = together[name][i]
            found = found[mask[i].bool()] if case.task == "causal LM" else found
            torch.testing.assert_close(found, alone[0], rtol=0, atol=2e-5)


@EVERY
def test_the_shadow_alone_is_the_exported_shadow(case: Case) -> None:
    model = case.model(num_shadow_layers=2)
    exported = model.export_shadow()
    attached = outputs_of(model)[1]
    model.set_inference_mode("shadow_only")
    alone, shadow = outputs_of(model)
    assert torch.equal(alone, shadow)
    assert torch.equal(alone, attached)
    torch.testing.assert_close(exported(tokens()).logits, alone)


@LANGUAGE
def test_cached_steps_equal_the_full_forward(case: Case) -> None:
    model, ids = case.model(num_shadow_layers=2), tokens(2, 9)
    cache, steps = None, []
    with torch.no_grad():
        for step in (ids[:, :4], ids[:, 4:5], ids[:, 5:7], ids[:, 7:]):
            outputs = model(step, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            steps.append((outputs.logits, outputs.shadow_logits))
    assert cache.get_seq_length() == 9
    for found, expected in zip(zip(*steps, strict=True), outputs_of(model, ids), strict=True):
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=2e-5)


@LANGUAGE
def test_decoding_with_a_cache_or_drafts_is_plain_decoding(case: Case) -> None:
    model, ids = case.model(num_shadow_layers=2), tokens(2, 7)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    draft = {"use_shadow_draft": True, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    draft["assistant_confidence_threshold"] = 0.0
    drafted = model.generate(ids, return_dict_in_generate=True, **GREEDY, **draft)
    assert torch.equal(drafted.sequences, expected)
    assert drafted.draft_statistics.drafted > 0
    assert torch.equal(model.generate(ids[:1], **GREEDY, **draft), expected[:1])


# ---------------------------------------------------------------- files and states


@EVERY
def test_saved_and_loaded_it_computes_the_same(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = case.task_class.from_pretrained(case.base(), tmp_path)
    assert same(loaded, model)
    assert not trained(loaded)
    again = case.task_class.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert trained(again).keys() == trained(model).keys()


class Parent(nn.Module):
    """A module with a task model somewhere inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"model": model})
        self.gain = nn.Parameter(torch.ones(3))


def by_state_dict(model: Any, other: Any, folder: Path) -> None:
    other.load_state_dict(model.state_dict())


def by_pickle(model: Any, other: Any, folder: Path) -> None:
    other.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))


def by_parent(model: Any, other: Any, folder: Path) -> None:
    assert not Parent(other).load_state_dict(Parent(model).state_dict()).missing_keys


def by_average(model: Any, other: Any, folder: Path) -> None:
    """Through `AveragedModel`, which copies the model and averages parameters in place."""
    average, into = AveragedModel(model), AveragedModel(other)
    average.update_parameters(model)
    assert same(average.module, model)
    into.load_state_dict(average.state_dict())
    other.load_state_dict(into.module.state_dict())


def by_save_file(model: Any, other: Any, folder: Path) -> None:
    save_file(model.state_dict(), folder / "state.safetensors")
    other.load_state_dict(load_file(folder / "state.safetensors"))


def by_save_model(model: Any, other: Any, folder: Path) -> None:
    save_model(model, str(folder / "model.safetensors"))
    load_model(other, folder / "model.safetensors")


ROADS = {
    "state dict": by_state_dict,
    "pickle": by_pickle,
    "parent": by_parent,
    "average": by_average,
    "save_file": by_save_file,
    "save_model": by_save_model,
}


@EVERY
@pytest.mark.parametrize("road", ROADS)
def test_a_state_makes_another_model_the_same(case: Case, road: str, tmp_path: Path) -> None:
    model, other = case.model(), case.model(seed=2)
    assert not same(model, other)
    ROADS[road](model, other, tmp_path)
    assert same(model, other)


@EVERY
def test_a_deep_copy_is_a_model_of_its_own(case: Case) -> None:
    model, other = case.model(), case.model(seed=2)
    copied = copy.deepcopy(model)
    assert same(copied, model)
    copied.load_state_dict(other.state_dict())
    assert same(copied, other)
    assert same(model, case.model())
