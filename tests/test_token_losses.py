"""The loss read from states before the heads: values and gradients of the logits' formula, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from shadow_peft import ShadowForCausalLM
from shadow_peft.base.task_head import TaskHead
from shadow_peft.losses import language_modeling as loss
from tests.tiny_models import SIZES, adapted, causal_lm, cohere, gemma2, llama, tokens

WEIGHTS = {"shadow_loss_weight": 0.4, "distillation_weight": 0.7, "distillation_temperature": 2.0}
STORED = {**WEIGHTS, "distillation_warmup_ratio": 0.25}


def softcapped() -> PreTrainedModel:
    return gemma2(final_logit_softcapping=0.5)


def scaled_up() -> PreTrainedModel:
    return cohere(logit_scale=3.0)


def scaled_down() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.0))


def of_several_layers() -> PreTrainedModel:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertLMHeadModel(BertConfig(**small, **off, is_decoder=True))


HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "linear": llama,
    "softcapped": softcapped,
    "scaled up": scaled_up,
    "scaled down": scaled_down,
    "of several layers": of_several_layers,
}


def model_with(kind: str, **settings: float) -> ShadowForCausalLM:
    torch.manual_seed(0)
    base = HEADS[kind]().double()
    model = ShadowForCausalLM(adapted(base.eval()), **{**WEIGHTS, **settings})
    model.peft_model.double()
    return model


def some_labels() -> tuple[Tensor, Tensor]:
    ids = tokens(3, 10)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = -100
    return ids, labels


def by_formula(model: ShadowForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss and its terms, from the logits of every token."""
    outputs = model.eval()(ids)
    keep, targets = labels[:, 1:].ne(-100), labels[:, 1:]
    logits, shadow = (x[:, :-1][keep] for x in (outputs.logits, outputs.shadow_logits))
    t = model.distillation_temperature
    p, q = (logits.detach() / t).softmax(-1), (shadow / t).softmax(-1)
    terms = [F.cross_entropy(logits, targets[keep]), F.cross_entropy(shadow, targets[keep])]
    terms.append(t**2 * (p * (p.log() - q.log())).sum(-1).mean())
    return terms[0] + model.shadow_loss_weight * terms[1] + model.distillation_weight * terms[2], terms


def gradients(model: ShadowForCausalLM, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("distillation_weight", [0.0, 0.7])
@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_the_formula(
    kind: str, chunk: int, distillation_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    model = model_with(kind, distillation_weight=distillation_weight)
    ids, labels = some_labels()
    expected, terms = by_formula(model, ids, labels)
    wanted = gradients(model, expected)
    outputs = model.train()(ids, labels=labels)
    assert outputs.logits is None
    assert outputs.shadow_logits is None
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(outputs.base_loss, terms[0].detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(outputs.shadow_loss, terms[1].detach(), rtol=1e-10, atol=0)
    if distillation_weight:
        torch.testing.assert_close(outputs.distillation_loss, terms[2].detach(), rtol=1e-10, atol=0)
    else:
        assert outputs.distillation_loss is None
    same(gradients(model, outputs.loss), wanted)


def test_what_a_head_is_shows_in_a_trial() -> None:
    kinds = {kind: (model := model_with(kind))._heads.of(model.peft_model).base for kind in HEADS}
    assert {kind: head.is_linear for kind, head in kinds.items()} == {kind: kind == "linear" for kind in HEADS}
    assert {k: head.reads_states for k, head in kinds.items()} == {k: k != "of several layers" for k in HEADS}


def test_distillation_teaches_the_shadow_and_leaves_the_base() -> None:
    model = model_with("linear", shadow_loss_weight=0.0)
    ids, labels = some_labels()
    outputs = model.train()(ids, labels=labels)
    expected, _ = by_formula(model, ids, labels)
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-10, atol=0)
    model.distillation_weight = 0.0
    alone = gradients(model, model.train()(ids, labels=labels).loss)
    model.distillation_weight = 0.7
    both = gradients(model, model.train()(ids, labels=labels).loss)
    for name in alone:
        injected = any(part in name for part in ("injection", "update", "output", "readout"))
        assert torch.allclose(alone[name], both[name], rtol=1e-9, atol=1e-14) == injected, name


def test_trained_heads_get_their_gradient() -> None:
    model = causal_lm(llama(), modules_to_save=["lm_head", "shadow_lm_head"], shadow_loss_weight=0.5)
    ids, labels = some_labels()
    expected = gradients(model, model(ids, labels=labels).loss)
    found = gradients(model, model.train()(ids, labels=labels).loss)
    assert {name for name in found if "task_heads" in name} == {
        f"peft_model.task_heads.{name}.weight" for name in ("lm_head", "shadow_lm_head")
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "softcapped"])
@pytest.mark.parametrize("distillation_weight", [0.0, 0.7])
def test_no_storage_as_large_as_the_logits_is_kept(kind: str, distillation_weight: float) -> None:
    torch.manual_seed(0)
    base = (llama if kind == "linear" else softcapped)()
    model = ShadowForCausalLM(adapted(base), shadow_loss_weight=0.4, distillation_weight=distillation_weight).train()
    ids, sizes = tokens(4, 120), []

    def note(tensor: Tensor) -> Tensor:
        sizes.append((tensor.shape[-1:], tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(ids, labels=ids)
    parameters = {p.numel() for p in model.parameters()} | {base.lm_head.weight.numel()}
    assert not [n for shape, n in sizes if shape == (96,) and n not in {0, *parameters}]
    outputs.loss.backward()
    assert model(ids, labels=ids, output_logits=True, output_shadow_logits=True).logits.shape == (4, 120, 96)


def test_only_tokens_with_a_target_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, counts = model_with("softcapped"), tokens(3, 10), []
    original = TaskHead._logits

    def counted(head: TaskHead, h: Tensor) -> Tensor:
        counts.append(h.numel() // h.shape[-1])
        return original(head, h)

    monkeypatch.setattr(TaskHead, "_logits", counted)
    labels = torch.full_like(ids, -100)
    labels[1, 3:5] = 7
    model.train()(ids, labels=labels)
    assert counts == [2, 2]


def test_half_precision_has_its_loss_in_float32() -> None:
    model, ids = causal_lm(llama().bfloat16(), shadow_loss_weight=0.5).train(), tokens()
    outputs = model(ids, labels=ids)
    assert outputs.loss.dtype == torch.float32
    expected = model.eval()(ids, labels=ids)
    torch.testing.assert_close(outputs.loss, expected.loss)
    same_dtype = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    outputs.loss.backward()
    assert same_dtype | {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_terms_are_per_target_of_the_batch_whatever_the_step_counts() -> None:
    model = model_with("linear").train()
    ids, labels = some_labels()
    alone, part = model(ids, labels=labels), model(ids, labels=labels, num_items_in_batch=1000)
    torch.testing.assert_close(part.base_loss, alone.base_loss)
    torch.testing.assert_close(part.loss * 1000 / labels[:, 1:].ne(-100).sum(), alone.loss)


@pytest.mark.parametrize("name", ShadowForCausalLM.loss_settings)
def test_a_factor_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ShadowForCausalLM(adapted(llama()), **{name: -1.0})


@pytest.mark.parametrize("variant", ["published", "peft"])
def test_the_factors_travel_with_the_checkpoint(variant: str, tmp_path: Path) -> None:
    ShadowForCausalLM(adapted(llama(), variant=variant), **STORED).save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert {name: getattr(loaded, name) for name in ShadowForCausalLM.loss_settings} == STORED
    assert ShadowForCausalLM.from_pretrained(llama(), tmp_path, shadow_loss_weight=0.1).shadow_loss_weight == 0.1
