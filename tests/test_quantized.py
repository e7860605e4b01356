"""Quantized bases: one step of training, files, generation and unloading; the shadow itself is never quantized."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.base.quantization import is_packed
from shadow_peft.training import ShadowTrainer
from tests.quantized_bases import KINDS, assert_same_bits, dequantized, frozen_bits, load, need, save_base
from tests.tiny_models import adapted, tokens, with_nonzero_weights
from tests.training.steps import by_hand, error

pytestmark = pytest.mark.filterwarnings("ignore")  # these packages have warnings of their own


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def base(kind: str, folder: Path) -> PreTrainedModel:
    return load(folder, kind)


def attached(base: PreTrainedModel, init: str = "auto") -> ShadowForCausalLM:
    torch.manual_seed(0)
    config = ShadowConfig(shadow_init=init, dropout=0.0, alpha=0.7)
    return ShadowForCausalLM(with_nonzero_weights(get_shadow_model(base, config)), shadow_loss_weight=0.5)


def test_a_quantized_base_trains_saves_loads_generates_and_is_given_back(base: PreTrainedModel, tmp_path: Path) -> None:
    ids = tokens()
    with torch.no_grad():
        before = base(ids).logits
    model = attached(base)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.peft_model.unload()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before)
    loaded = ShadowForCausalLM.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), written)


def test_the_shadow_is_cut_from_what_the_quantized_weights_mean(base: PreTrainedModel) -> None:
    layer = attached(base, "base").peft_model.shadow_model.layers[0]
    assert {(type(p), p.dtype) for p in layer.parameters()} == {(torch.nn.Parameter, torch.float32)}
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    theirs = base.model.layers[0].mlp.gate_proj(x)
    difference = (layer.mlp.gate_proj(x) - theirs).abs().max() / theirs.abs().max()
    assert difference < 0.02  # 8 bit of bitsandbytes rounds its inputs as well


def packed(folder: Path) -> PreTrainedModel:
    """A 4 bit base whose weights bitsandbytes has repacked in an inference."""
    need("bitsandbytes 4")
    base = load(folder, "bitsandbytes 4")
    with torch.no_grad():
        base(tokens())
    if not is_packed(base.model.layers[0].mlp.gate_proj.weight):
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 alone, and this one has none")
    return base


def test_the_shadow_is_cut_from_weights_that_were_packed_for_inference(folder: Path) -> None:
    before = load(folder, "bitsandbytes 4") if packed(folder) else None
    expected = attached(before, "base").peft_model.shadow_model.state_dict()
    for name, value in attached(packed(folder), "base").peft_model.shadow_model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=2**-8, atol=0), name  # scales in bfloat16


def test_gradients_pass_weights_that_were_packed_for_inference(folder: Path) -> None:
    """The kernel of packed weights has no gradient for its input."""
    base, ids = packed(folder), tokens()
    model, expected = (attached(b, "random").train() for b in (base, dequantized(folder, "bitsandbytes 4")))
    model.eval()
    with torch.no_grad():
        model(ids)
    found = by_hand(model.train(), model(ids, labels=ids).loss)
    assert error(found, by_hand(expected, expected(ids, labels=ids).loss)) < 0.02  # scales in bfloat16


def test_a_packed_base_is_given_back_as_it_was(folder: Path) -> None:
    base = packed(folder)
    weights = {n: (p.data.clone(), p.quant_state.absmax.clone()) for n, p in base.named_parameters() if is_packed(p)}
    first, second = attached(base), attached(base)
    assert not any(is_packed(p) for p in base.parameters())
    first.peft_model.unload()
    assert not any(is_packed(p) for p in base.parameters())
    second.peft_model.unload()
    for name, (data, scales) in weights.items():
        weight = base.get_parameter(name)
        assert is_packed(weight), name
        assert torch.equal(weight.data, data), name
        assert torch.equal(weight.quant_state.absmax, scales), name
        assert weight.quant_state.original_nested


def test_an_adapter_that_is_not_trained_leaves_the_kernels_alone(folder: Path, tmp_path: Path) -> None:
    base = packed(folder)
    attached(load(folder, "bitsandbytes 4")).save_pretrained(tmp_path / "adapter")
    model = ShadowForCausalLM.from_pretrained(base, tmp_path / "adapter")
    assert is_packed(base.model.layers[0].mlp.gate_proj.weight)
    for part in model.peft_model.parts().values():
        part.requires_grad_(True)
    model.train()
    assert not is_packed(base.model.layers[0].mlp.gate_proj.weight)


def test_a_dropped_wrapper_gives_the_kernels_back(folder: Path) -> None:
    base = packed(folder)
    attached(base)
    assert is_packed(base.model.layers[0].mlp.gate_proj.weight)


def test_a_copy_of_an_adapted_model_is_unloaded_on_its_own(folder: Path) -> None:
    model, ids = attached(packed(folder), "random"), tokens()
    twin = copy.deepcopy(model)
    base = twin.peft_model.unload()
    with torch.no_grad():
        base(ids)
    assert is_packed(base.model.layers[0].mlp.gate_proj.weight)
    model.eval()(ids)
    assert not any(is_packed(p) for p in model.peft_model.base_model.parameters())


def test_weights_are_counted_as_what_they_stand_for(base: PreTrainedModel, folder: Path) -> None:
    quantized, plain = (attached(b, "random").peft_model for b in (base, load(folder, None)))
    assert quantized.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


@pytest.mark.parametrize("trained", [[], ["lm_head", "shadow_lm_head"]])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_copied_and_exported_as_floats(
    bits: int, trained: list[str], folder: Path, tmp_path: Path
) -> None:
    need("bitsandbytes 4")
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["none"])
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    assert not base.lm_head.weight.is_floating_point()
    ids, model = tokens(), ShadowForCausalLM(adapted(base, modules_to_save=trained), shadow_loss_weight=0.5)
    model.train()(ids, labels=ids).loss.backward()
    model.eval().export_shadow().save_pretrained(tmp_path / "small")
    with torch.no_grad():
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits
        expected = model(ids).shadow_logits
    # in evaluation, 8 bit of bitsandbytes rounds a token's states to 1 / 127 of their largest, on average half as much
    assert (small - expected).norm() < expected.norm() / 127


def test_a_quantized_gpt2_starts_its_shadow_from_transposed_weights(tmp_path: Path) -> None:
    need("bitsandbytes 8")
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=96, n_positions=64)).eval()
    plain.save_pretrained(tmp_path / "gpt2")
    base = load(tmp_path / "gpt2", "bitsandbytes 8")
    expected = plain.transformer.h[0].state_dict()
    for name, value in attached(base, "base").peft_model.shadow_model.h[0].state_dict().items():
        assert torch.allclose(value, expected[name], atol=float(expected[name].abs().max()) / 127), name


def test_a_quantized_shadow_is_refused(folder: Path) -> None:
    need("bitsandbytes 8")
    with pytest.raises(ValueError, match=r"shadow_model is quantized with 'bitsandbytes'.*load it without"):
        get_shadow_model(load(folder, None), ShadowConfig(), shadow_model=load(folder, "bitsandbytes 8"))


def test_a_method_without_gradients_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("bitsandbytes 8")
    base = load(folder, "bitsandbytes 8")
    monkeypatch.setattr(type(base.hf_quantizer), "is_trainable", False)
    model = attached(base)
    with pytest.raises(ValueError, match=r"quantized with 'bitsandbytes'.*pass no gradient"):
        ShadowTrainer(model)


def test_training_by_hand_leaves_every_bit_of_the_base(base: PreTrainedModel) -> None:
    before, ids = frozen_bits(base), tokens()
    model = attached(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval().generate(ids[:, :4], max_new_tokens=2, do_sample=False)
    assert_same_bits(frozen_bits(base), before)
    model.peft_model.unload()
    assert_same_bits(frozen_bits(base), before)
