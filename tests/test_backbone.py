"""Where a backbone comes from: its embeddings, its starting point, its width."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowPeftModel, get_shadow_model, prepare_shadow_model
from tests.tiny_models import BASES, SIZES, adapted, gemma3, gpt2, llama, qwen3, tokens, with_nonzero_weights


def implicit(base: PreTrainedModel, **config: object) -> PreTrainedModel:
    return get_shadow_model(base, ShadowConfig(**config)).shadow_model


@pytest.mark.parametrize("name", BASES)
def test_an_implicit_shadow_has_no_table_of_its_own(name: str) -> None:
    model = get_shadow_model(BASES[name](), ShadowConfig())
    tables = [n for n, p in model.shadow_model.named_parameters() if p.shape == (SIZES["vocab_size"], SIZES["hidden_size"])]
    assert not tables
    assert not [n for n in model.adapter_state_dict() if "embed_tokens" in n or "wte" in n]


def test_an_implicit_shadow_follows_the_bases_table() -> None:
    model, ids = ShadowForCausalLM(adapted(gpt2())), tokens()
    before = model(ids).shadow_logits
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert not torch.allclose(model(ids).shadow_logits, before)


@pytest.mark.parametrize("asked", [False, True])
def test_an_explicit_table_is_frozen_unless_asked(asked: bool) -> None:
    config = ShadowConfig(train_shadow_embeddings=asked)
    model = get_shadow_model(llama(), config, shadow_model=qwen3(2, num_hidden_layers=2))
    assert model.shadow_model.get_input_embeddings().weight.requires_grad == asked
    assert "shadow_model.embed_tokens.weight" in model.adapter_state_dict()


def test_removing_an_explicit_table_shares_the_bases() -> None:
    backbone = prepare_shadow_model(llama(2, num_hidden_layers=2), remove_embed_tokens=True)
    assert type(backbone).__name__ == "LlamaModel"
    model, ids = (
        ShadowForCausalLM(with_nonzero_weights(get_shadow_model(llama(), ShadowConfig(), shadow_model=backbone))),
        tokens(),
    )
    assert "shadow_model.embed_tokens.weight" not in model.state_dict()
    expected = backbone(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    torch.testing.assert_close(model(ids).shadow_logits, model.peft_model.base_model.lm_head(expected))
    narrow = prepare_shadow_model(llama(2, hidden_size=16), remove_embed_tokens=True)
    with pytest.raises(ValueError, match="reads states 16 wide, but the base's embeddings are 32 wide"):
        get_shadow_model(llama(), ShadowConfig(), shadow_model=narrow)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("where", ["first", "even"])
def test_starting_from_the_base_copies_its_layers(name: str, where: str) -> None:
    base = BASES[name]()
    shadow = implicit(base, num_shadow_layers=2, shadow_init="base", shadow_init_layers=where)
    source = base.base_model.state_dict()
    stem = "h" if name == "gpt2" else "layers"
    chosen = {"first": {"0": "0", "1": "1"}, "even": {"0": "0", "1": "3"}}[where]
    state = shadow.state_dict()
    assert {key.split(".")[1] for key in state if key.startswith(stem)} == {"0", "1"}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == stem:
            parts[1] = chosen[parts[1]]
        assert torch.equal(tensor, source[".".join(parts)]), key


def test_a_cut_of_every_layer_is_the_base_itself() -> None:
    base, ids = llama(), tokens()
    model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(num_shadow_layers=4, shadow_init="base")))
    torch.testing.assert_close(model(ids).shadow_logits, base(ids).logits)


def test_per_layer_settings_follow_the_chosen_layers() -> None:
    base = gemma3()
    config = implicit(base, num_shadow_layers=2, shadow_init="base", shadow_init_layers="even").config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert implicit(base, num_shadow_layers=3).config.layer_types == base.config.layer_types[:3]


def test_random_and_base_are_different_starts() -> None:
    base = llama()
    torch.manual_seed(0)
    weight = implicit(base, shadow_init="random").layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, base.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(
        implicit(base, shadow_init="auto").layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight
    )


def test_a_thinner_mlp_keeps_the_neurons_that_weigh_most() -> None:
    base = llama()
    mlp = base.model.layers[0].mlp
    with torch.no_grad():
        for i in (5, 17, 40):
            mlp.up_proj.weight[i] *= 50
    cut = implicit(base, shadow_init="base", shadow_intermediate_size=3).layers[0].mlp
    rows = [5, 17, 40]
    assert torch.equal(cut.up_proj.weight, mlp.up_proj.weight[rows])
    assert torch.equal(cut.gate_proj.weight, mlp.gate_proj.weight[rows])
    assert torch.equal(cut.down_proj.weight, mlp.down_proj.weight[:, rows])


def test_fewer_heads_keep_whole_groups_that_weigh_most() -> None:
    base = llama()
    attention = base.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, 24:32] *= 50  # query head 3, of key/value group 1
    cut = implicit(base, shadow_init="base", shadow_num_attention_heads=1, shadow_num_key_value_heads=1).layers[0].self_attn
    assert torch.equal(cut.q_proj.weight, attention.q_proj.weight[24:32])
    assert torch.equal(cut.k_proj.weight, attention.k_proj.weight[8:16])
    assert torch.equal(cut.v_proj.weight, attention.v_proj.weight[8:16])
    assert torch.equal(cut.o_proj.weight, attention.o_proj.weight[:, 24:32])


def test_what_cannot_start_from_the_base_is_said(caplog: pytest.LogCaptureFixture) -> None:
    impossible = {"shadow_head_dim": 16}
    with pytest.raises(ValueError, match=r"base has no tensor|no tensor of shape"):
        implicit(llama(), shadow_init="base", **impossible)
    with caplog.at_level(logging.INFO, logger="shadow_peft"):
        assert implicit(llama(), shadow_init="auto", **impossible).layers[0].self_attn.q_proj.weight.shape == (64, 32)
    assert "starts at random" in caplog.text
    with pytest.raises(ValueError, match="width of a head"):
        implicit(gpt2(), shadow_init="base", shadow_num_attention_heads=2)
    with pytest.raises(ValueError, match="has only 4 decoder layers"):
        implicit(llama(), num_shadow_layers=5)


def test_a_shadow_of_another_width_gets_a_projection() -> None:
    model, ids = ShadowForCausalLM(adapted(llama(), shadow_model=llama(2, hidden_size=16))), tokens()
    assert isinstance(model.peft_model.shadow_hidden_projection, nn.Linear)
    state = model.peft_model.shadow_model(ids).last_hidden_state
    expected = model.peft_model.base_model.lm_head(model.peft_model.shadow_hidden_projection(state))
    torch.testing.assert_close(model(ids).shadow_logits, expected)


def test_bases_that_cannot_be_adapted_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 decoder layers"):
        get_shadow_model(llama(num_hidden_layers=1), ShadowConfig())
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        get_shadow_model(nn.Linear(2, 2), ShadowConfig())
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        get_shadow_model(llama(), ShadowConfig(), shadow_model=nn.Linear(2, 2))
    wrapped = get_shadow_model(llama(), ShadowConfig())
    for twice in (wrapped, ShadowForCausalLM(wrapped)):
        with pytest.raises(ValueError, match="carries a shadow adapter already"):
            get_shadow_model(twice, ShadowConfig())
    assert wrapped.shadow_injection_model.injection_ups.requires_grad
    with pytest.raises(TypeError, match="get_shadow_model"):
        ShadowForCausalLM(llama())


def test_a_bare_decoder_is_a_base_too() -> None:
    base, ids = AutoModel.from_config(llama().config).eval(), tokens()
    model = with_nonzero_weights(get_shadow_model(base, ShadowConfig()))
    outputs, state = model.forward_with_shadow(ids)
    assert outputs.last_hidden_state.shape == state.shape == (3, 10, 32)
    assert not torch.allclose(outputs.last_hidden_state, base(ids).last_hidden_state)
    with pytest.raises(ValueError, match="no causal LM"):
        ShadowForCausalLM(model)


def test_forward_with_shadow_returns_the_initial_state() -> None:
    model, ids = adapted(llama()), tokens()
    outputs, state = model.forward_with_shadow(input_ids=ids)
    assert isinstance(model, ShadowPeftModel)
    torch.testing.assert_close(state, model.shadow_model(inputs_embeds=model.get_input_embeddings()(ids))[0])
    torch.testing.assert_close(outputs.logits, model(ids).logits)


@pytest.mark.parametrize("init", ["auto", "base", "random"])
def test_a_base_without_numbers_gets_a_shadow_without_numbers(init: str) -> None:
    """Of a model on the meta device sizes and counts can be asked, such as those of a base that does not fit here."""
    real = get_shadow_model(llama(), ShadowConfig(shadow_init=init))
    model = get_shadow_model(llama().to("meta"), ShadowConfig(shadow_init=init))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
