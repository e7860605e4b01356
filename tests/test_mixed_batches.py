"""A batch whose rows belong to different adapters: each row is what that adapter computes alone, in forward and training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft import ShadowConfig, ShadowForCausalLM
from shadow_peft.inputs import ModelInputs
from shadow_peft.multi_adapter.rows import merge_rows
from shadow_peft.multi_adapter.weights import pieces_of
from tests.test_named_adapters import OTHERS, several, stir
from tests.tiny_models import FAMILIES, classifier, gemma3, llama, llama_classifier, qwen3, tokens

NAMES = ["readout", "__base__", "published", "default", "peft", "wide", "published", "heads", "__base__", "readout"]
TOLERANCE = {"rtol": 0, "atol": 1e-5}

OF_ONE_KIND: dict[str, list[dict[str, Any]]] = {
    "published": [{"injection_hidden_size": r, "gate_hidden_size": k, "alpha": a} for r, k, a in ((3, 5, 0.5), (9, 2, 1.5))],
    "peft": [{"injection_hidden_size": r, "gate_hidden_size": k, "alpha": a} for r, k, a in ((3, 5, 0.5), (9, 2, 1.5))],
    "readout": [
        {"injection_hidden_size": 3, "output_hidden_size": 7, "alpha": 0.5},
        {"injection_hidden_size": 9, "output_hidden_size": 2, "gate_hidden_size": 5, "readout_hidden_size": 3},
    ],
}
"""Variant -> adapters of other ranks and factors."""


def of_one_kind(variant: str, base: PreTrainedModel | None = None, **more: Any) -> ShadowForCausalLM:
    """A causal LM with adapters "a", "b" and "c" of one variant and different ranks."""
    model = several(base, names=())
    for seed, settings in enumerate([{}, *OF_ONE_KIND[variant]]):
        name = "abc"[seed]
        torch.manual_seed(seed)
        model.add_adapter(name, ShadowConfig(variant=variant, **{"dropout": 0.0, **settings, **more}))
        stir(model.peft_model.adapter(name), seed)
    return model.eval()


def alone(model: Any, names: list[str], ids: Tensor, **kwargs: Any) -> list[Any]:
    """What each row computes in a batch of its own adapter alone."""
    active, outputs = model.active_adapter, []
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in kwargs.items()}
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(model(ids[row : row + 1], **one))
        else:
            model.set_adapter(name)
            outputs.append(model(ids[row : row + 1], **one))
    model.set_adapter(active)
    return outputs


@torch.no_grad()
def check_rows(model: Any, names: list[str], ids: Tensor, **kwargs: Any) -> None:
    """Each row of a mixed batch equals that row alone."""
    mixed = model(ids, adapter_names=names, **kwargs)
    real = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
    for row, expected in enumerate(alone(model, names, ids, **kwargs)):
        real_row = real[row] if mixed.logits.dim() == 3 else slice(None)
        torch.testing.assert_close(mixed.logits[row][real_row], expected.logits[0][real_row], **TOLERANCE)
        if names[row] == "__base__":
            assert not mixed.shadow_logits[row].any()
        else:
            torch.testing.assert_close(mixed.shadow_logits[row][real_row], expected.shadow_logits[0][real_row], **TOLERANCE)


def padded(rows: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths, padded on the left, and their mask."""
    ids = tokens(rows, length)
    for row in range(rows):
        ids[row, : row % 4] = 0
    return ids, ids.ne(0).long()


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_its_adapter_alone(family: str) -> None:
    names = [name for name in NAMES if name != "wide" or family == "llama"]
    model = several(FAMILIES[family](), names=tuple(name for name in OTHERS if name in names))
    ids, mask = padded(len(names))
    check_rows(model, names, ids, attention_mask=mask)


@pytest.mark.parametrize("variant", OF_ONE_KIND)
@pytest.mark.parametrize("names", ["abc", "aabbcc", "cabcabcab", "aaab_c", "a_a", "___"])
def test_ranks_side_by_side(variant: str, names: str) -> None:
    model = of_one_kind(variant)
    listed = ["__base__" if name == "_" else name for name in names]
    check_rows(model, listed, tokens(len(listed), 6))


def test_injections_that_normalize_beside_those_that_do_not() -> None:
    model = of_one_kind("readout")
    for seed, name in enumerate("de"):
        model.add_adapter(name, ShadowConfig(variant="readout", normalize_injection=False))
        stir(model.peft_model.adapter(name), seed)
    check_rows(model.eval(), ["a", "d", "b", "e", "d", "__base__"], tokens(6))


@pytest.mark.parametrize("variant", OF_ONE_KIND)
def test_two_layers_and_half_precision(variant: str) -> None:
    model = of_one_kind(variant, llama(num_hidden_layers=2))
    check_rows(model, ["b", "a", "c"], tokens(3))
    half = of_one_kind(variant, llama().to(torch.bfloat16))
    with torch.no_grad():
        mixed = half(tokens(3), adapter_names=["b", "a", "c"]).logits
        expected = torch.cat([output.logits for output in alone(half, ["b", "a", "c"], tokens(3))])
    assert mixed.dtype == torch.bfloat16
    assert (mixed - expected).abs().max() < 0.05 * expected.abs().max()


def test_rows_of_the_base_are_bit_exact() -> None:
    model = several(names=("published", "readout"))
    ids = tokens(4)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["published", "__base__", "readout", "__base__"]).logits
        bare = model.peft_model.base_model(ids).logits
    assert torch.equal(mixed[[1, 3]], bare[[1, 3]])


def test_embeddings_and_last_logits() -> None:
    model, names = several(), ["readout", "__base__", "published", "default", "peft", "heads"]
    ids = tokens(6)
    with torch.no_grad():
        expected = model(ids, adapter_names=names)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds, adapter_names=names).logits, expected.logits)
        last = model(ids, adapter_names=names, logits_to_keep=2)
        states = model.peft_model(ids, adapter_names=names, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(last.logits, expected.logits[:, -2:])
    torch.testing.assert_close(last.shadow_logits, expected.shadow_logits[:, -2:])
    assert states.shape == (6, 10, 32)


def test_shadows_alone() -> None:
    model, names = several(), ["readout", "wide", "published", "default", "peft", "heads"]
    model.set_inference_mode("shadow_only")
    with torch.no_grad():
        mixed = model(tokens(6), adapter_names=names).logits
    for row, expected in enumerate(alone(model, names, tokens(6))):
        torch.testing.assert_close(mixed[row], expected.logits[0], **TOLERANCE)
    with pytest.raises(ValueError, match="has no shadow"):
        model(tokens(2), adapter_names=["__base__", "default"])


def test_classifiers_have_their_own_heads() -> None:
    model = classifier(llama_classifier())
    for seed, (name, variant) in enumerate({"a": "published", "b": "readout", "c": "readout"}.items()):
        model.add_adapter(name, ShadowConfig(variant=variant, dropout=0.0))
        stir(model.peft_model.adapter(name), seed)
    names = ["b", "default", "__base__", "a", "c", "b"]
    ids, mask = padded(6)
    check_rows(model.eval(), names, ids, attention_mask=mask)


def test_the_base_runs_once_and_backbones_on_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = several(names=("published", "readout")), {}
    watched = {"base": model.peft_model.base_model.model.layers[0]}
    watched |= {name: model.peft_model.adapter(name).shadow_model.layers[0] for name in ("published", "readout", "default")}
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(len(args[0])))
    model(tokens(5), adapter_names=["published", "__base__", "readout", "published", "published"])
    assert seen == {"base": [5], "published": [3], "readout": [1]}


def test_threads_do_not_meet() -> None:
    model, ids = several(names=("published", "peft", "readout")), tokens(3)
    batches = [["published", "peft", "__base__"], ["readout", "default", "readout"], ["peft", "readout", "published"]]
    with torch.no_grad():
        expected = [model(ids, adapter_names=names).logits for names in batches]

    def answer(turn: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(ids, adapter_names=batches[turn % 3]).logits, expected[turn % 3])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(answer, range(24)))


def test_thin_maps_are_batched_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many products for four adapters on eight rows as for two on two."""
    model = of_one_kind("readout")
    model.add_adapter("d", ShadowConfig(variant="readout"))
    calls: list[int] = []
    bmm, baddbmm = torch.bmm, torch.baddbmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: calls.append(len(a[0])) or bmm(*a, **k))
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: calls.append(len(a[1])) or baddbmm(*a, **k))
    counts = []
    for names in ("ab", "abcdabcd", "aaab"):
        calls.clear()
        with torch.no_grad():
            model(tokens(len(names)), adapter_names=list(names))
        counts.append((len(calls), set(calls)))
    assert counts == [(counts[0][0], {2}), (counts[0][0], {4}), (counts[0][0], {4})]


def test_pieces_and_rows() -> None:
    assert pieces_of([4, 4]) == [0, 1]
    assert pieces_of([6, 2]) == [0, 0, 0, 1]
    assert pieces_of([3, 2]) == [0, 0, 0, 1, 1]
    parts = [([2, 0], torch.tensor([2, 0])), ([1, 3], torch.tensor([1, 3]))]
    assert merge_rows(parts).tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- training


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("distillation", [0.0, 0.3])
def test_the_loss_of_a_mixed_batch_and_its_gradients(distillation: float) -> None:
    model, names = several(), NAMES
    model.distillation_weight = distillation
    model.shadow_loss_weight = 0.5
    model.peft_model.set_requires_grad(["default", *OTHERS])
    model.train()
    ids, mask = padded(len(names))
    labels = ids.masked_fill(mask.eq(0), -100)
    labels[2] = -100
    count = labels[:, 1:].ne(-100).sum()
    mixed = model(ids, attention_mask=mask, labels=labels, adapter_names=names)
    mixed.loss.backward()
    found = gradients(model)

    total = torch.zeros(())
    expected: dict[str, Tensor] = {}
    for row, name in enumerate(names):
        one = {"attention_mask": mask[row : row + 1], "labels": labels[row : row + 1], "num_items_in_batch": count}
        if name == "__base__":
            with model.disable_adapter():
                total = total + model(ids[row : row + 1], **one).loss.detach()
            continue
        model.set_adapter(name)
        loss = model(ids[row : row + 1], **one).loss
        loss.backward()
        model.set_adapter("default")
        model.peft_model.set_requires_grad(["default", *OTHERS])
        for parameter, gradient in gradients(model).items():
            expected[parameter] = expected.get(parameter, 0) + gradient
        total = total + loss.detach()
    torch.testing.assert_close(mixed.loss.detach(), total, rtol=1e-5, atol=1e-6)
    given = {name: gradient for name, gradient in found.items() if gradient.any()}
    assert given.keys() == {name for name, gradient in expected.items() if gradient.any()}
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", OF_ONE_KIND)
def test_gradients_of_grouped_adapters(variant: str) -> None:
    model, names, ids = of_one_kind(variant), list("bacab"), tokens(5)
    model.peft_model.set_requires_grad(list("abc"))
    model.train()
    model(ids, labels=ids, adapter_names=names).loss.backward()
    found = gradients(model)
    for name in "abc":
        model.set_adapter(name)
        rows = [row for row, other in enumerate(names) if other == name]
        model(ids[rows], labels=ids[rows], num_items_in_batch=5 * 9).loss.backward()
        model.set_adapter("default")
        prefix = f"peft_model.other_adapters.{name}."
        for parameter, expected in gradients(model).items():
            if parameter.startswith(prefix):
                torch.testing.assert_close(found[parameter], expected, rtol=1e-3, atol=1e-6)
        model.peft_model.set_requires_grad(list("abc"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = several(names=("published", "peft"))
        model.add_adapter("second", ShadowConfig(variant="readout", dropout=0.0))
        stir(model.peft_model.adapter("second"), 3)
        model.peft_model.set_requires_grad(["published", "peft", "second"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        names = ["second", "published", "peft", "default", "__base__", "published"]
        model(tokens(6), labels=tokens(6), adapter_names=names).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_only_what_is_trained_gets_a_gradient() -> None:
    model = several(names=("published", "readout")).train()
    model(tokens(4), labels=tokens(4), adapter_names=["published", "default", "readout", "__base__"]).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert not any("other_adapters" in name for name, p in model.named_parameters() if p.requires_grad)


def test_classification_loss_of_a_mixed_batch() -> None:
    model = classifier(llama_classifier())
    model.add_adapter("b", ShadowConfig(variant="readout"))
    stir(model.peft_model.adapter("b"), 5)
    model.eval()
    names, labels, ids = ["b", "__base__", "default", "b"], torch.tensor([2, 1, -100, 0]), tokens(4)
    mixed = model(ids, labels=labels, adapter_names=names).loss
    total = torch.zeros(())
    for row, name in enumerate(names):
        one = {"labels": labels[row : row + 1], "num_items_in_batch": 3}
        if name == "__base__":
            with model.disable_adapter():
                total = total + model(ids[row : row + 1], **one).loss
        else:
            model.set_adapter(name)
            total = total + model(ids[row : row + 1], **one).loss
            model.set_adapter("default")
    torch.testing.assert_close(mixed, total)


@pytest.mark.parametrize("variant", OF_ONE_KIND)
def test_dropout_has_the_probability_of_each_adapter(variant: str) -> None:
    """Half of the thin product of "a" is dropped, nothing of "b"; the mean stays."""
    model = of_one_kind(variant)
    model.add_adapter("halved", ShadowConfig(variant=variant, dropout=0.5))
    model.add_adapter("whole", ShadowConfig(variant=variant, dropout=0.0))
    for name in ("halved", "whole"):
        stir(model.peft_model.adapter(name), 3)
    ids = tokens(1, 6).expand(40, -1)
    names = ["halved", "whole"] * 20
    with torch.no_grad():
        kept = model.eval()(ids, adapter_names=names).logits
        dropped = model.train()(ids, adapter_names=names, output_logits=True).logits
    torch.testing.assert_close(dropped[1::2], kept[1::2], **TOLERANCE)
    assert (dropped[::2] - kept[::2]).abs().amax((1, 2)).gt(1e-4).all()


# ---------------------------------------------------------------- what is refused


def test_what_is_refused() -> None:
    model, ids = several(names=("published",)), tokens(2)
    with pytest.raises(ValueError, match="There is no adapter 'nobody'; there are 'default', 'published'"):
        model(ids, adapter_names=["default", "nobody"])
    for wrong in (["default"], "default", ["default"] * 3):
        with pytest.raises(ValueError, match="one name a row, 2 names"):
            model(ids, adapter_names=wrong)
    with model.disable_adapter(), pytest.raises(ValueError, match="disable_adapter"):
        model(ids, adapter_names=["default", "published"])
    lonely = classifier(llama_classifier())
    lonely.peft_model.add_adapter("headless", ShadowConfig())
    with pytest.raises(ValueError, match="'headless' has no classifier_head"):
        lonely(ids, adapter_names=["headless", "default"])


def test_widened_residual_streams() -> None:
    from tests.conformance.tiny import tiny_model

    for kind in ("gemma3n_text", "qwen4_exp_text", "deepseek_v4"):
        model = several(tiny_model(kind), names=("published", "peft"))
        for seed, rank in enumerate((4, 7)):
            model.add_adapter(f"readout{rank}", ShadowConfig(variant="readout", injection_hidden_size=rank))
            stir(model.peft_model.adapter(f"readout{rank}"), seed)
        names = ["readout4", "default", "peft", "readout7", "__base__", "published", "readout4"]
        check_rows(model.eval(), names, tokens(7, 8))


def test_a_batch_of_one_name_is_that_adapter() -> None:
    for base in (gemma3(), qwen3()):
        model = several(base, names=("readout",))
        mixed = model(tokens(), adapter_names=["readout"] * 3)
        model.set_adapter("readout")
        assert torch.equal(mixed.logits, model(tokens()).logits)


def test_positions_of_as_many_kinds_as_there_are_rows_keep_their_kinds() -> None:
    """Qwen-VL's positions `[3, B, T]`, for three rows: rows are chosen, not kinds."""
    positions = torch.arange(3 * 3 * 4).view(3, 3, 4)
    chosen = ModelInputs(tokens(3, 4), position_ids=positions).select_rows([2])
    assert torch.equal(chosen.position_ids, positions[:, 2:])
    assert torch.equal(chosen.input_ids, tokens(3, 4)[2:])
