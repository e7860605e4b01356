"""What depends on the device, with the CPU as the reference: bfloat16, graphs, kinds of cache, 4 bit, drafting, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model, prepare_shadow_model
from tests.quantized_bases import need, save_base, settings
from tests.tiny_models import causal_lm, llama, tokens, with_nonzero_weights

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
ALWAYS: dict[str, Any] = {
    **GREEDY, "use_shadow_draft": True, "num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0, "return_dict_in_generate": True,
}  # fmt: skip
VARIANTS = ["readout", "published", "peft"]


def adapted(device: str, dtype: torch.dtype = torch.float32, variant: str = "readout") -> ShadowForCausalLM:
    """A tiny adapted Llama whose every weight counts, made on the CPU and moved."""
    torch.manual_seed(0)
    base = llama(initializer_range=0.2).to(dtype)
    config = ShadowConfig(variant=variant, dropout=0.0)
    return ShadowForCausalLM(with_nonzero_weights(get_shadow_model(base, config))).eval().to(device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_the_cpu(device: str, variant: str) -> None:
    ids, found = tokens(2, 9), {}
    for place in ("cpu", device):
        model = adapted(place, variant=variant).train()
        output = model(ids.to(place), labels=ids.to(place))
        output.loss.backward()
        gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        found[place] = (output.loss.detach().cpu(), gradients)
    (expected, reference), (loss, gradients) = found["cpu"], found[device]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-2, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("autocast", [False, True])
def test_training_beside_a_bfloat16_base_lowers_the_loss(device: str, autocast: bool) -> None:
    model, ids = adapted(device, torch.bfloat16).train(), tokens(2, 12).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(trained, lr=5e-3), []
    for _ in range(12):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafting_writes_what_greedy_decoding_writes(device: str, variant: str, rows: int) -> None:
    model, ids = adapted(device, variant=variant), tokens(rows, 7).to(device)
    drafted = model.generate(ids, **ALWAYS)
    assert torch.equal(drafted.sequences, model.generate(ids, **GREEDY))
    assert drafted.draft_statistics.drafted > 0


def test_generation_in_bfloat16_is_a_forward_passs_choice(device: str) -> None:
    """Every token written with the cache is within rounding of the best one without it."""
    model, ids = adapted(device, torch.bfloat16), tokens(2, 7).to(device)
    written = model.generate(ids, **GREEDY)
    with torch.no_grad():
        logits = model(written).logits[:, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(2, written[:, ids.shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()


def test_compiled_decoding_with_a_static_cache(device: str) -> None:
    """With CUDA graphs on a GPU; without them elsewhere."""
    torch._dynamo.reset()
    model, ids = adapted(device), tokens(2, 6).to(device)
    expected = model.generate(ids, **GREEDY)
    how: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    step = torch.compile(model, fullgraph=True, **how)
    cache = model.peft_model.with_shadow_cache(StaticCache(config=model.config, max_cache_len=32))
    sequence, last = ids, ids
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            positions = torch.arange(sequence.shape[1] - last.shape[1], sequence.shape[1], device=device)[None].expand(2, -1)
            output = step(last, position_ids=positions, past_key_values=cache, use_cache=True, output_shadow_logits=False)
            last = output.logits[:, -1:].argmax(-1).clone()
            sequence = torch.cat([sequence, last], 1)
    torch._dynamo.reset()
    assert torch.equal(sequence, expected)


def test_a_compiled_training_step(device: str) -> None:
    torch._dynamo.reset()
    model, ids = adapted(device).train(), tokens(2, 9).to(device)
    compiled = torch.compile(model, **({} if device == "cuda" else {"backend": "aot_eager"}))

    def gradients(call: Any) -> dict[str, Tensor]:
        model.zero_grad()
        call(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(model), gradients(compiled)
    torch._dynamo.reset()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static"])
def test_kinds_of_cache_write_the_same(device: str, kind: str) -> None:
    if kind.startswith("offloaded") and device == "cpu":
        pytest.skip("offloading a cache needs an accelerator")
    model, ids = adapted(device), tokens(2, 7).to(device)
    expected = model.generate(ids, **GREEDY)
    for compiled in (False, True) if device == "cuda" and kind == "static" else (False,):
        written = model.generate(ids, cache_implementation=kind, disable_compile=not compiled, **GREEDY)
        assert torch.equal(written, expected)


def test_a_quantized_cache_holds_what_the_bare_base_holds(device: str) -> None:
    base, ids = llama().to(device), tokens(2, 9).to(device)
    exact = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    rounded = {**exact, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    expected, unrounded = (torch.stack(copy.deepcopy(base).generate(ids, **how).logits) for how in (rounded, exact))
    assert (expected - unrounded).abs().max() > 1e-3  # or else the cache rounds nothing
    fresh = ShadowForCausalLM(get_shadow_model(base, ShadowConfig())).eval()
    torch.testing.assert_close(torch.stack(fresh.generate(ids, **rounded).logits), expected)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes has warnings of its own
def test_a_base_of_4_bits_trains_drafts_and_is_given_back(device: str, tmp_path: Path) -> None:
    need("bitsandbytes 4")
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    how = {"quantization_config": settings("bitsandbytes 4", compute), "device_map": device}
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"), dtype=compute, **how).eval()
    ids = tokens(2, 9).to(device)
    with torch.no_grad():
        before = base(ids).logits
    model = ShadowForCausalLM(with_nonzero_weights(get_shadow_model(base, ShadowConfig(variant="readout"))))
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    drafted = model.generate(ids[:1], **ALWAYS)
    assert drafted.draft_statistics.drafted > 0
    model.peft_model.unload()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before)


def test_saved_here_loads_anywhere(device: str, tmp_path: Path) -> None:
    model, ids = adapted(device), tokens(2, 9)
    model.save_pretrained(tmp_path)
    base = llama(initializer_range=0.2)
    loaded = ShadowForCausalLM.from_pretrained(base, tmp_path).eval()
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    with torch.no_grad():
        expected = model(ids.to(device)).logits.cpu()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_the_adapter_follows_the_bases_device(device: str) -> None:
    model = causal_lm(llama().to(device))
    assert {p.device.type for p in model.parameters()} == {device}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_shadow_is_exported_where_it_is(device: str, fold: bool, tied: bool) -> None:
    backbone = prepare_shadow_model(llama(2, num_hidden_layers=2), remove_embed_tokens=True)
    peft = get_shadow_model(llama(tie_word_embeddings=tied), ShadowConfig(), shadow_model=backbone)
    model, ids = ShadowForCausalLM(peft).eval().to(device), tokens(2, 9).to(device)
    exported = model.export_shadow(fold=fold)
    assert exported.device.type == device
    torch.testing.assert_close(exported(ids).logits, model(ids).shadow_logits, rtol=1e-4, atol=1e-4)


def test_a_projected_shadow_is_folded_where_it_is(device: str) -> None:
    model, ids = ShadowForCausalLM(get_shadow_model(llama(), ShadowConfig(shadow_hidden_size=16))), tokens(2, 9).to(device)
    folded = model.eval().to(device).export_shadow(fold=True)
    torch.testing.assert_close(folded(ids).logits, model(ids).shadow_logits, rtol=1e-4, atol=1e-4)
