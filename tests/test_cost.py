"""What an adapter must not cost."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowPeftModel, get_shadow_model
from shadow_peft.base.task_head import TaskHead
from tests.tiny_models import SIZES, adapted, causal_lm, classifier, gpt2, llama, qwen3_classifier, tokens

VOCABULARY, WIDTH = SIZES["vocab_size"], SIZES["hidden_size"]


def storages(model: torch.nn.Module) -> list[tuple[int, ...]]:
    seen = {t.untyped_storage().data_ptr(): tuple(t.shape) for t in (*model.parameters(), *model.buffers())}
    return list(seen.values())


def test_no_copy_of_the_head_unless_it_is_trained() -> None:
    assert storages(causal_lm(llama())).count((VOCABULARY, WIDTH)) == 2  # embeddings and head of the base
    assert storages(causal_lm(llama(), modules_to_save=["lm_head"])).count((VOCABULARY, WIDTH)) == 3


class Counter:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        original = TaskHead.__call__

        def counted(head: TaskHead, h: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return original(head, h)

        monkeypatch.setattr(TaskHead, "__call__", counted)


@pytest.fixture
def shadow_heads(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def test_shadow_logits_are_computed_only_where_somebody_reads_them(shadow_heads: Counter) -> None:
    model, ids = causal_lm(llama()), tokens()
    model.shadow_loss_weight = 0.0
    model.train()
    outputs = model(ids, labels=ids)
    assert shadow_heads.calls == 0
    assert outputs.shadow_logits is None
    assert model(ids, labels=ids, output_shadow_logits=True).shadow_logits is not None
    model.eval()
    assert model(ids).shadow_logits is not None
    before = shadow_heads.calls
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert shadow_heads.calls == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_behind_frozen_heads_are_computed_once_in_a_training_step(shadow_heads: Counter, dtype: torch.dtype) -> None:
    model, ids = causal_lm(llama().to(dtype)), tokens()
    model.train()
    model(ids, labels=ids).loss.backward()
    assert shadow_heads.calls == (0 if dtype == torch.float32 else 2)  # torch's own loss, or one of base and shadow each
    trained = causal_lm(llama().to(dtype), modules_to_save=["lm_head"])
    trained.train()
    trained(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.peft_model.task_heads["lm_head"].parameters())


def test_every_trainable_parameter_of_the_smallest_base_gets_a_gradient() -> None:
    model, ids = causal_lm(llama(num_hidden_layers=2)), tokens()
    model.train()
    model(ids, labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    zero = [n for n, p in model.named_parameters() if p.requires_grad and p.numel() and not p.grad.any()]
    assert not zero
    assert all(p.grad is None for p in model.peft_model.base_model.parameters())


def test_the_last_update_is_stored_but_not_trained() -> None:
    model = adapted(llama(), variant="published")
    assert not any(p.requires_grad for p in model.shadow_update_model.last.parameters())
    assert sum("update_gates.2." in name for name in model.adapter_state_dict()) == 2


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = causal_lm(llama())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trainable / total
    model.print_trainable_parameters()
    assert (
        f"Trainable params: {trainable:,} || Total params: {total:,} || Trainable%: {share:.2f}%\n"
        == capsys.readouterr().out
    )


class Operations(TorchDispatchMode):
    """Counts dispatched operations that are no views."""

    VIEWS = (
        "view",
        "t.",
        "transpose",
        "slice",
        "split",
        "chunk",
        "expand",
        "unbind",
        "select",
        "_unsafe_view",
        "detach",
        "alias",
        "unsqueeze",
        "permute",
        "as_strided",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.float32_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        self.count += not name.startswith(self.VIEWS)
        self.float32_products += name.startswith(("mm", "addmm")) and args[0].dtype == torch.float32
        return func(*args, **(kwargs or {}))


def operations(model: torch.nn.Module, ids: torch.Tensor) -> int:
    with torch.no_grad(), Operations() as counter:
        model(input_ids=ids, use_cache=False)
    return counter.count


@pytest.mark.parametrize(
    ("variant", "most"),
    [
        ("readout", 10),  # norm, clamp, addcdiv, mm, addmm, sub; 2 sub, mm, addmm
        ("published", 10),  # sub, mm, addmm; norm, mm, silu, 2 mm, sigmoid, lerp
        ("peft", 11),  # no norm, but biases and another dropout
    ],
)
def test_operations_per_layer(variant: str, most: int) -> None:
    def added(layers: int) -> int:
        base, ids = llama(num_hidden_layers=layers), tokens()
        alone = operations(base, ids)
        return operations(get_shadow_model(base, ShadowConfig(variant=variant)).eval(), ids) - alone

    assert (added(8) - added(4)) / 4 <= most


def step_operations(model: torch.nn.Module, prompt: torch.Tensor) -> tuple[int, int]:
    """Operations, and products in float32, of one more step of an undrafted greedy generation."""
    counters = [Operations(), Operations()]
    for counter, tokens_made in zip(counters, (4, 5), strict=True):
        with counter:
            model.generate(prompt, max_new_tokens=tokens_made, do_sample=False, eos_token_id=None, pad_token_id=0)
    first, second = counters
    return second.count - first.count, second.float32_products - first.float32_products


@pytest.mark.parametrize(("dtype", "per_layer", "once"), [(torch.float32, 10, 62), (torch.bfloat16, 14, 77)])
def test_operations_of_a_decoding_step(dtype: torch.dtype, per_layer: int, once: int) -> None:
    """In half precision on a CPU a layer has four casts more; once a step, backbone, read-out and preparation."""

    def added(layers: int) -> int:
        base = llama(num_hidden_layers=layers).to(dtype).eval()
        alone, _ = step_operations(base, tokens())
        model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(variant="readout"))).eval()
        return step_operations(model, tokens())[0] - alone

    few, many = added(4), added(8)
    assert (many - few) / 4 <= per_layer
    assert few <= 3 * per_layer + once


def test_few_tokens_of_a_base_in_half_precision_are_corrected_in_float32() -> None:
    base = llama(num_hidden_layers=4).to(torch.bfloat16)
    model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(variant="readout"))).eval()
    assert step_operations(model, tokens())[1] == 3 * 4 + 4  # four products a layer, four of the read-out
    with torch.no_grad(), Operations() as counter:
        model(torch.zeros(1, 17, dtype=torch.long))
    assert counter.float32_products == 0


def test_a_trained_head_is_the_only_head_computed() -> None:
    model, ids = causal_lm(llama(), modules_to_save=["lm_head"]), tokens()
    with torch.no_grad():
        model.peft_model.task_heads["lm_head"].weight.mul_(2)
    computed = []
    model.peft_model.base_model.lm_head.register_forward_hook(lambda m, a, out: computed.append(out.numel()))
    doubled = model(ids, output_shadow_logits=False).logits
    assert computed == [0]
    torch.testing.assert_close(doubled, 2 * causal_lm(llama())(ids).logits)


@pytest.mark.parametrize("named", [[], ["classifier_head"], ["shadow_classifier_head"]])
def test_classification_heads_are_trained_unless_a_subset_is_named(named: list[str]) -> None:
    model = classifier(qwen3_classifier(), modules_to_save=named)
    assert model.classifier_head.weight.requires_grad == (not named or "classifier_head" in named)
    assert model.shadow_classifier_head.weight.requires_grad == (not named or "shadow_classifier_head" in named)


def test_gpt2_trains_and_saves_no_copy_of_its_table() -> None:
    model = adapted(gpt2())
    assert not [name for name in model.adapter_state_dict() if "wte" in name]
    assert not [n for n, p in model.shadow_model.named_parameters() if p.shape == (VOCABULARY, WIDTH)]
    assert isinstance(ShadowForCausalLM(model).peft_model, ShadowPeftModel)


class WideProducts(TorchDispatchMode):
    """Counts batched products that have one column for each token of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))  # type: ignore[operator]
        self.count += func is torch.ops.aten.bmm.default and result.shape[-1] == VOCABULARY
        return result


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_costs_one_product_with_a_frozen_head(rows: int, drafts: bool) -> None:
    """A batch of products, which torch makes of a slice's last tokens, would copy the head's weight for every row."""
    model, ids = causal_lm(llama()), tokens(rows, 6)
    with WideProducts() as products, torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False, use_shadow_draft=drafts)
        model(ids, logits_to_keep=1)
        model.peft_model.base_model(ids, logits_to_keep=1)
    assert products.count == 0
