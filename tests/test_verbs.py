"""What an engineer who knows PEFT tries in the first minutes."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from shadow_peft import (
    AutoShadowModelForCausalLM,
    AutoShadowModelForSequenceClassification,
    ShadowConfig,
    ShadowForCausalLM,
    ShadowForSequenceClassification,
    get_shadow_model,
)
from shadow_peft.demo.embedded import load_base, load_tokenizer
from tests.tiny_models import causal_lm, classifier, llama, qwen3_classifier, tokens


@pytest.mark.parametrize("variant", ["published", "peft", "readout"])
def test_an_adapter_finds_its_base(variant: str, tmp_path: Path) -> None:
    llama(3).save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model, ids = causal_lm(base, variant=variant), tokens()
    model.save_pretrained(tmp_path / "out")
    loaded = AutoShadowModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(loaded, ShadowForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    alone = AutoShadowModelForCausalLM.from_pretrained(tmp_path / "out", inference_mode="shadow_only")
    assert torch.equal(alone(ids).logits, model(ids).shadow_logits)


def test_a_classifier_finds_its_base_and_its_number_of_classes(tmp_path: Path) -> None:
    llama(3, num_labels=5).save_pretrained(tmp_path / "base")  # a causal LM: no classification head, and no num_labels
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model, ids = classifier(base), tokens()
    model.save_pretrained(tmp_path / "out")
    loaded = AutoShadowModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, ShadowForSequenceClassification)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_an_adapter_that_does_not_know_its_base_says_so(tmp_path: Path) -> None:
    causal_lm(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say where its base is found"):
        AutoShadowModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoShadowModelForCausalLM()


def test_the_name_of_a_base_is_no_base() -> None:
    with pytest.raises(TypeError, match=r"load the base first: AutoModelForCausalLM.from_pretrained\('Qwen/Qwen3-0.6B'\)"):
        get_shadow_model("Qwen/Qwen3-0.6B", ShadowConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_what_cannot_be_merged_says_why(verb: str) -> None:
    model = causal_lm(llama())
    for wrapper in (model, model.peft_model):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            getattr(wrapper, verb)()


def test_the_verbs_of_peft_are_seen() -> None:
    for model in (causal_lm(llama()), classifier(qwen3_classifier()), causal_lm(llama()).peft_model):
        assert {"unload", "disable_adapter", "get_base_model", "merge_and_unload", "print_trainable_parameters"} <= set(
            dir(model)
        )


def test_unload_of_a_task_model_gives_the_base_back() -> None:
    base, ids = llama(), tokens()
    before = base(ids).logits
    model = causal_lm(base)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert model.unload() is base
    assert torch.equal(base(ids).logits, before)


def test_printing_shows_sizes() -> None:
    shown = str(causal_lm(llama(), variant="readout"))
    assert "variant='readout', r=8, k=6, alpha=0.7, adapter=" in shown
    assert "ShadowInjectionModel(layers=3, d=32, r=8)" in shown
    assert "ShadowReadoutModel(d=32, k=6, m=32)" in shown
    assert "StackedUpdateWeights(layers=2, d=32, k=6, trained=True)" in str(causal_lm(llama()))


def test_drafting_is_an_argument_of_generate() -> None:
    parameters = inspect.signature(ShadowForCausalLM.generate).parameters
    assert "use_shadow_draft" in parameters
    assert "use_shadow_draft" in (ShadowForCausalLM.generate.__doc__ or "")
    model, ids = causal_lm(llama()), tokens(1, 5)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_shadow_draft=True), plain)


def test_a_pipeline_answers_without_complaints(caplog: pytest.LogCaptureFixture) -> None:
    base, tokenizer = load_base(), load_tokenizer()
    expected = pipeline("text-generation", model=base, tokenizer=tokenizer)("go to", max_new_tokens=5, do_sample=False)
    model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig())).eval()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            made = pipeline("text-generation", model=model, tokenizer=tokenizer)
            assert made("go to", max_new_tokens=5, do_sample=False) == expected
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "not supported" not in caplog.text


def test_an_adapter_is_answered_with_by_its_path_alone(tmp_path: Path) -> None:
    llama(3).save_pretrained(tmp_path / "base")
    causal_lm(type(llama()).from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "out")
    script = (
        "import torch; from shadow_peft import AutoShadowModelForCausalLM as Auto; "
        f"print(Auto.from_pretrained({str(tmp_path / 'out')!r})(torch.tensor([[5, 6, 7]])).logits.shape)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "torch.Size([1, 3, 96])"
