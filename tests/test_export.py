"""The detached shadow: a model of its own that computes what the attached shadow computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from shadow_peft import AutoModelForCausalLMWithHiddenProjection, ShadowForCausalLM, ShadowForSequenceClassification
from tests.tiny_models import BASES, adapted, causal_lm, classifier, cohere, gemma2, llama, qwen3, qwen3_classifier, tokens


def no_shared_tensor(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = ({t.untyped_storage().data_ptr() for t in m.parameters()} for m in (one, other))
    return not ours & theirs


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("heads", [[], ["shadow_lm_head"]])
def test_an_implicit_shadow_is_a_stock_model(name: str, heads: list[str], tmp_path: Path) -> None:
    model, ids = causal_lm(BASES[name](), modules_to_save=heads), tokens()
    for head in model.peft_model.task_heads.values():
        nn.init.normal_(head.weight)
    exported = model.export_shadow()
    assert type(exported) is type(model.peft_model.base_model)
    assert no_shared_tensor(exported, model)
    exported.save_pretrained(tmp_path)
    expected = model(ids).shadow_logits
    torch.testing.assert_close(exported(ids).logits, expected)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'shadow_peft' not in sys.modules\n"
        f"print(model(torch.tensor({ids.tolist()})).logits.double().sum().item())"
    )
    if name == "llama" and not heads:  # once in a process that never imports this library
        done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
        assert float(done.stdout) == pytest.approx(expected.double().sum().item(), abs=1e-3)


def test_a_classifier_is_exported_with_its_head(tmp_path: Path) -> None:
    model, ids = classifier(qwen3_classifier()), tokens()
    model.export_shadow().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).shadow_logits)


def softcapped() -> PreTrainedModel:
    return gemma2(final_logit_softcapping=2.0, attn_logit_softcapping=3.0)


def scaled() -> PreTrainedModel:
    return cohere(logit_scale=0.25)


@pytest.mark.parametrize("make_base", [llama, softcapped, scaled])
def test_a_shadow_of_another_width_is_a_projected_model(make_base, tmp_path: Path) -> None:
    model, ids = (
        ShadowForCausalLM(adapted(make_base(), shadow_model=qwen3(3, hidden_size=16, num_hidden_layers=2))),
        tokens(),
    )
    exported = model.export_shadow()
    assert isinstance(exported, AutoModelForCausalLMWithHiddenProjection)
    assert no_shared_tensor(exported, model)
    exported.save_pretrained(tmp_path)
    loaded, expected = AutoModelForCausalLM.from_pretrained(tmp_path), model(ids).shadow_logits
    torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)
    model.set_inference_mode("shadow_only")
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))
    assert torch.equal(loaded.generate(ids, **settings), loaded.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("make_base", [llama, softcapped])
def test_an_explicit_shadow_of_the_same_width(make_base) -> None:
    model, ids = ShadowForCausalLM(adapted(make_base(), shadow_model=qwen3(3, num_hidden_layers=2))), tokens()
    torch.testing.assert_close(model.export_shadow()(ids).logits, model(ids).shadow_logits, rtol=1e-4, atol=1e-5)


def test_an_explicit_shadow_without_a_table_gets_a_copy() -> None:
    from shadow_peft import prepare_shadow_model

    backbone = prepare_shadow_model(llama(2, num_hidden_layers=2), remove_embed_tokens=True)
    model, ids = ShadowForCausalLM(adapted(llama(), shadow_model=backbone)), tokens()
    exported = model.export_shadow()
    torch.testing.assert_close(exported(ids).logits, model(ids).shadow_logits)
    assert no_shared_tensor(exported, model)
    assert "embed_tokens.weight" not in str(model.state_dict().keys())


@pytest.mark.parametrize("is_base_tied", [True, False])
def test_a_table_that_is_the_head_too_is_stored_once(is_base_tied: bool, tmp_path: Path) -> None:
    from shadow_peft import prepare_shadow_model

    backbone = prepare_shadow_model(llama(2, num_hidden_layers=2), remove_embed_tokens=True)
    base = llama(tie_word_embeddings=is_base_tied)
    model, ids = ShadowForCausalLM(adapted(base, shadow_model=backbone)), tokens()
    exported = model.export_shadow()
    assert exported.config.tie_word_embeddings == is_base_tied
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == is_base_tied
    exported.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert ("lm_head.weight" in stored.keys()) != is_base_tied  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).shadow_logits)


def wrapped(optimal: bool) -> tuple[AutoModelForCausalLMWithHiddenProjection, PreTrainedModel, PreTrainedModel]:
    small, large = qwen3(1, hidden_size=16), llama(2, hidden_size=64)
    projection = nn.Linear(16, 64, bias=False)
    model = AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small, shadow_hidden_projection=projection, lm_head=large.lm_head, init_optimal_projection=optimal
    )
    return model, small, large


def test_wrap_solves_for_the_best_projection() -> None:
    model, small, large = wrapped(optimal=True)
    best = torch.linalg.lstsq(large.lm_head.weight.double(), small.lm_head.weight.double()).solution
    torch.testing.assert_close(model.shadow_hidden_projection.weight.double(), best, rtol=1e-5, atol=1e-5)
    ids = tokens()
    drawn, _, _ = wrapped(optimal=False)
    errors = [(m(ids).logits - small(ids).logits).square().mean() for m in (model, drawn)]
    assert errors[0] < errors[1]
    assert model.lm_head.weight.requires_grad == large.lm_head.weight.requires_grad
    assert no_shared_tensor(model.lm_head, large)
    assert no_shared_tensor(model.shadow_model, small)


def test_a_wrapped_model_brings_its_projection_along() -> None:
    model, _, _ = wrapped(optimal=True)
    peft = adapted(llama(2, hidden_size=64), shadow_model=model)
    assert torch.equal(peft.shadow_hidden_projection.weight, model.shadow_hidden_projection.weight)
    with pytest.raises(ValueError, match="maps 16 to 64"):
        adapted(llama(), shadow_model=wrapped(optimal=False)[0])


@pytest.mark.parametrize("freeze", [{}, {"freeze_backbone": True}, {"freeze_embed_tokens": False, "freeze_lm_head": False}])
def test_what_loading_freezes(freeze: dict[str, bool], tmp_path: Path) -> None:
    wrapped(optimal=False)[0].save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithHiddenProjection.from_pretrained(tmp_path, **freeze)
    assert model.shadow_model.norm.weight.requires_grad == (not freeze.get("freeze_backbone", False))
    assert model.get_input_embeddings().weight.requires_grad == (not freeze.get("freeze_embed_tokens", True))
    assert model.lm_head.weight.requires_grad == (not freeze.get("freeze_lm_head", True))
    assert model.shadow_hidden_projection.weight.requires_grad
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert model.shadow_hidden_projection.weight.grad.any()


@pytest.mark.parametrize("freeze", [True, False])
def test_a_table_that_is_to_be_trained_is_so_behind_a_preparation(freeze: bool, tmp_path: Path) -> None:
    from shadow_peft import prepare_shadow_model

    wrapped(optimal=False)[0].save_pretrained(tmp_path)
    for prepare in (prepare_shadow_model, lambda model: model):
        shadow = AutoModelForCausalLMWithHiddenProjection.from_pretrained(tmp_path, freeze_embed_tokens=freeze)
        peft = adapted(llama(2, hidden_size=64), shadow_model=prepare(shadow))
        assert peft.shadow_model.get_input_embeddings().weight.requires_grad != freeze


def test_wrap_refuses_what_does_not_fit() -> None:
    small, large = qwen3(1, hidden_size=16), llama(2, hidden_size=64)

    def wrap(projection: nn.Linear, **more: object) -> object:
        return AutoModelForCausalLMWithHiddenProjection.wrap(
            shadow_model=small, shadow_hidden_projection=projection, lm_head=large.lm_head, **more
        )

    with pytest.raises(ValueError, match="must map 16 to 64, it maps 64 to 16"):
        wrap(nn.Linear(64, 16, bias=False))
    with pytest.raises(ValueError, match="no bias"):
        wrap(nn.Linear(16, 64))


@pytest.mark.parametrize("kind", ["explicit", "narrow explicit", "narrow implicit", "projected"])
def test_a_classifier_is_exported_with_its_trained_head(kind: str, tmp_path: Path) -> None:
    shadow = {
        "explicit": lambda: llama(5),
        "narrow explicit": lambda: llama(5, hidden_size=16),
        "narrow implicit": lambda: None,
        "projected": lambda: wrapped_for(llama(5, hidden_size=16)),
    }[kind]()
    sizes = {"shadow_hidden_size": 16} if kind == "narrow implicit" else {}
    model = ShadowForSequenceClassification(adapted(qwen3_classifier(), shadow_model=shadow, **sizes)).eval()
    with torch.no_grad():
        model.shadow_classifier_head.weight.mul_(-1.5)
    exported = model.export_shadow()
    exported.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = tokens()
    ids[0, 7:] = 0
    mask = ids.ne(0).long()
    model.set_inference_mode("shadow_only")
    torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert no_shared_tensor(exported, model.peft_model.base_model)


def wrapped_for(small: Any) -> Any:
    return AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small, shadow_hidden_projection=nn.Linear(16, 32, bias=False), lm_head=llama().lm_head
    )


def test_a_classifier_on_a_bare_decoder_is_exported(tmp_path: Path) -> None:
    config = qwen3_classifier().config
    base = AutoModel.from_config(config).eval()
    model = ShadowForSequenceClassification(adapted(base)).eval()
    model.set_inference_mode("shadow_only")
    model.export_shadow().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)
