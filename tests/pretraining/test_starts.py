"""Where a pretraining starts: named layers, a narrower shadow, a small model under the base's head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadow_peft import AutoModelForCausalLMWithHiddenProjection, ShadowConfig
from shadow_peft.pretraining.shadows import implicit_shadow, shares_embeddings, small_shadow
from shadow_peft.pretraining.student import AlignedStudent, Objective, Student
from shadow_peft.pretraining.trainer import finished
from tests.tiny_models import gpt2, llama, qwen3, tokens

SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}


def shadow_logits(student: Student) -> torch.Tensor:
    with torch.no_grad():
        return finished(student).eval()(tokens()).logits


def in_a_subspace(width: int) -> Any:
    """A base whose residual stream lies in `width` dimensions, with norms that are not all ones."""
    base = llama()
    basis = torch.linalg.qr(torch.randn(32, width))[0]
    inside = basis @ basis.T
    with torch.no_grad():
        base.model.embed_tokens.weight.copy_(50 * base.model.embed_tokens.weight @ inside)  # far above the norms' epsilon
        for layer in base.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(inside @ linear.weight)
        for name, p in base.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 2)
    return base


@pytest.mark.parametrize("sizes", [{}, {"shadow_intermediate_size": 24, "shadow_num_attention_heads": 2}])
def test_a_narrow_cut_computes_what_the_wide_one_does(sizes: dict[str, int]) -> None:
    base = in_a_subspace(16)
    shape = {"num_shadow_layers": 2, "shadow_init": "base", "shadow_init_layers": "even", **sizes}
    wide = Student(implicit_shadow(base, ShadowConfig(**shape)), Objective())
    narrow = Student(implicit_shadow(base, ShadowConfig(**shape, shadow_hidden_size=16), text=[tokens(4, 30)]), Objective())
    assert shares_embeddings(wide.model)
    assert not shares_embeddings(narrow.model)
    torch.testing.assert_close(shadow_logits(narrow), shadow_logits(wide), rtol=1e-4, atol=1e-4)
    trained = {name.split(".")[1] for name in narrow.trained()}
    assert trained == {"shadow_model", "shadow_hidden_projection"}
    assert not any("embed" in name for name in narrow.trained())
    assert any("embed" in name for name in narrow.state_dict())


def test_a_narrow_cut_of_other_norms_is_refused() -> None:
    config = ShadowConfig(shadow_init="base", shadow_hidden_size=16)
    with pytest.raises(ValueError, match="the base has no norm"):
        implicit_shadow(gpt2(), config, text=[tokens()])
    with pytest.raises(ValueError, match="no states"):
        implicit_shadow(llama(), config)


@pytest.mark.parametrize("padding", [0, 8])
def test_a_small_model_starts_as_itself(padding: int) -> None:
    base, small = llama(), qwen3(3, **SMALL, vocab_size=96 + padding)
    with torch.no_grad():  # a head that the base's can reproduce
        small.lm_head.weight[:96] = base.lm_head.weight @ torch.randn(32, 16)
        expected = small(tokens()).logits[..., :96]
    made = small_shadow(base, small, tokens=96)
    assert made.fit is not None
    assert made.fit.relative_error < 1e-5
    student = Student(made.model, Objective())
    torch.testing.assert_close(shadow_logits(student), expected, rtol=1e-4, atol=1e-4)
    assert not any("embed" in name or "head" in name for name in student.trained())


def test_a_small_model_with_the_bases_head_needs_no_projection() -> None:
    base, small = llama(), llama(1, num_hidden_layers=2)
    small.lm_head.weight.data.copy_(base.lm_head.weight)
    made = small_shadow(base, small)
    assert made.fit is None
    assert isinstance(made.model.shadow_hidden_projection, torch.nn.Identity)
    with pytest.raises(ValueError, match="no projection to align"):
        AlignedStudent(made.model, Objective(0, 1), made.own_head)  # type: ignore[arg-type]


def test_a_small_model_of_the_same_width_and_another_head_gets_one() -> None:
    made = small_shadow(llama(), llama(1, num_hidden_layers=2))
    assert made.fit is not None
    assert isinstance(made.model.shadow_hidden_projection, torch.nn.Linear)


def test_a_carried_projection_is_kept(tmp_path: Path) -> None:
    base, small = llama(), qwen3(3, **SMALL)
    student = Student(small_shadow(base, small).model, Objective())
    torch.nn.init.normal_(student.model.shadow_hidden_projection.weight)
    expected = shadow_logits(student)
    finished(student).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, AutoModelForCausalLMWithHiddenProjection)
    made = small_shadow(base, again)
    assert made.own_head is None
    assert made.fit is None
    torch.testing.assert_close(shadow_logits(Student(made.model, Objective())), expected)


def test_aligning_trains_the_projection_alone_and_runs_the_backbone_once() -> None:
    made = small_shadow(llama(), qwen3(3, **SMALL))
    assert made.own_head is not None
    student = AlignedStudent(made.model, Objective(0, 1, top_k=95), made.own_head).train()
    torch.nn.init.normal_(student.model.shadow_hidden_projection.weight, std=0.5)  # instead of the fit
    runs: list[int] = []
    student.model.shadow_model.register_forward_hook(lambda *_: runs.append(1))
    assert list(student.trained()) == ["model.shadow_hidden_projection.weight"]
    optimizer = torch.optim.Adam(student.trained().values(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = student(tokens(4, 16))["loss"]
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(runs) == 60
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():  # the loss is the divergence from the small model's own head, over the whole vocabulary
        own = qwen3(3, **SMALL)(tokens(4, 16)).logits[:, :-1].log_softmax(-1)
        said = finished(student).eval()(tokens(4, 16)).logits[:, :-1].log_softmax(-1)
        divergence = torch.nn.functional.kl_div(said, own, log_target=True, reduction="none").sum(-1).mean()
        torch.testing.assert_close(student(tokens(4, 16))["loss"], divergence, rtol=1e-3, atol=1e-5)


def test_named_layers_are_cut() -> None:
    base = llama()
    model = implicit_shadow(base, ShadowConfig(num_shadow_layers=2, shadow_init="base", shadow_init_layers="1,2"))
    for new, old in ((0, 1), (1, 2)):
        assert torch.equal(model.shadow_model.layers[new].mlp.up_proj.weight, base.model.layers[old].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="names layer 4, but the base's layers are 0 to 3"):
        implicit_shadow(base, ShadowConfig(num_shadow_layers=2, shadow_init="base", shadow_init_layers="1,4"))


def test_the_own_head_of_a_small_model_goes_where_the_student_goes() -> None:
    """Its untied head is no part of the student, and learning from it needs both in one place."""
    made = small_shadow(llama(), qwen3(hidden_size=16, tie_word_embeddings=False))
    student = (
        AlignedStudent(made.model, Objective(next_token=0.0, distillation=1.0), made.own_head).to(torch.float64).train()
    )
    loss = student(tokens())["loss"]
    assert loss.dtype == torch.float64
    loss.backward()
    assert not [name for name in student.state_dict() if "lm_head" in name]
