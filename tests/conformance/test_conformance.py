"""The conformance checks on a few types that differ as much as possible; ``make conformance`` runs all of them.

A Llama, query norms, capped logits, positions outside the layers, nested decoders, alibi, expert mixtures, hybrids of
attention with recurrence or convolution, recurrence alone, weights shared between layers, several streams, tables looked up
by id, scaled embeddings, post-norm encoders used as decoders.
"""

from __future__ import annotations

import pytest

from shadow_peft import ShadowConfig, get_shadow_model
from tests.conformance.checks import CHECKS
from tests.conformance.outcomes import NotApplicable, Refused
from tests.conformance.sweep import UNSUPPORTED, document, failing, sweep
from tests.conformance.tiny import applicable_types, tiny_model

TYPES = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "mpt",
    "mixtral",
    "jamba",
    "qwen3_next",
    "mamba",
    "lfm2",
    "zamba",
    "gemma3n_text",
    "xglm",
    "bert",
)


REFUSED = {
    ("bert", "fold"): "more than one linear layer",
    ("bert", "fold, Llama"): "more than one linear layer",
    ("gemma2", "fold, Llama"): "the logits are capped at 30.0, and LlamaForCausalLM caps none",
    ("gemma3n_text", "fold, Llama"): "the logits are capped at 30.0, and LlamaForCausalLM caps none",
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("model_type", TYPES)
def test_conformance(model_type: str, check: str) -> None:
    if (model_type, check) in REFUSED:
        with pytest.raises(Refused, match=REFUSED[model_type, check]):
            CHECKS[check](model_type)
        return
    try:
        CHECKS[check](model_type)
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("model_type", [name for name in UNSUPPORTED if name in applicable_types()])
def test_an_unsupported_type_is_refused_by_name_with_the_reason(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"'{model_type}'.*{UNSUPPORTED[model_type][:40]}"):
        get_shadow_model(tiny_model(model_type), ShadowConfig())


def test_a_worker_that_dies_or_hangs_fails_its_type_alone() -> None:
    rows = sweep(["no such type", "llama"], jobs=2, timeout=0.0)
    assert all(failing(rows[name]) == list(CHECKS) for name in rows)


def test_the_table_shows_every_verdict() -> None:
    rows = sweep(["no such type"], jobs=1, timeout=60.0)
    text = document(rows, {"blt": "no decoder"})
    assert "| no such type | FAIL (1) |" in text
    assert "| blt | no decoder |" in text
