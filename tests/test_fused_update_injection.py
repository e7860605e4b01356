"""Update and injection as one step: values and gradients of the two formulas, and what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shadow_peft.coupling import EvolvingStateCoupling
from shadow_peft.layers.fused_update_injection import fused_update_injection
from shadow_peft.layers.injection import inject
from shadow_peft.layers.update import Norm, UpdateWeights, update
from tests.test_formulas import draw
from tests.tiny_models import adapted, causal_lm, llama, tokens

N, D, R, K = 6, 8, 3, 2
VARIANTS = {"published": False, "peft": True}


def weights_of(paper: bool) -> list[Tensor]:
    """The update's tensors in the order of `fused_update_injection`: weights, biases ("peft"), norm ("published")."""
    weights = [draw(2 * K, D), draw(D, K), draw(D, K, seed=9)]
    rest = [draw(2 * K), draw(D), draw(D, seed=5)] if paper else [draw(D, seed=7), draw(D, seed=8)]
    return [*weights, *rest]


def step(function, tensors: list[Tensor], paper: bool, updating: bool, dropout: float) -> tuple[Tensor, Tensor]:
    """One step with the same choice of dropout each time."""
    torch.manual_seed(5)
    h, s, down, up, *rest = tensors
    if not updating:
        return function(h, s, down, up, 0.6, dropout, paper)
    weights = UpdateWeights(*rest[:6]) if paper else UpdateWeights(*rest[:3])
    return function(h, s, down, up, 0.6, dropout, paper, weights, None if paper else Norm(*rest[3:]))


def one_by_one(h, s, down, up, alpha, dropout, paper, weights=None, norm=None) -> tuple[Tensor, Tensor]:
    """The reference: plain autograd of the two formulas."""
    s = s if weights is None else update(h, s, weights, norm, dropout)
    return inject(h, s, down, up, alpha, dropout, paper), s


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("updating", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_those_of_the_formulas(variant: str, updating: bool, dropout: float) -> None:
    paper = VARIANTS[variant]
    tensors = [
        draw(2, N, D, seed=1),
        draw(2, N, D, seed=2),
        draw(D, R),
        draw(R, D),
        *(weights_of(paper) if updating else []),
    ]
    outcomes = []
    for function in (one_by_one, fused_update_injection):
        outputs = step(function, tensors, paper, updating, dropout)
        scalar = sum((o * draw(2, N, D, seed=20 + i).detach()).sum() for i, o in enumerate(outputs))
        outcomes.append((outputs, torch.autograd.grad(scalar, tensors)))
    (expected, wanted), (found, gradients) = outcomes
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("updating", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_small_differences(variant: str, updating: bool, dropout: float) -> None:
    paper = VARIANTS[variant]
    tensors = [
        draw(1, 3, D, seed=1),
        draw(1, 3, D, seed=2),
        draw(D, R),
        draw(R, D),
        *(weights_of(paper) if updating else []),
    ]
    assert torch.autograd.gradcheck(lambda *x: step(fused_update_injection, list(x), paper, updating, dropout), tensors)


def kept_per_token(run, tokens: int, skip: set[int]) -> float:
    """Float64 entries per token that a run keeps for its backward pass, by storage; `skip` are storages of others."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = run()
    assert kept is not None
    return sum(seen.values()) / 8 / tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_for_the_backward_pass(variant: str) -> None:
    paper = VARIANTS[variant]
    tensors = [draw(2, N, D, seed=1), draw(2, N, D, seed=2), draw(D, R), draw(R, D), *weights_of(paper)]
    skip = {t.untyped_storage().data_ptr() for t in tensors[1:]}
    kept = kept_per_token(lambda: step(fused_update_injection, tensors, paper, True, 0.3), 2 * N, skip)
    choices = (D if paper else K + R) / 8  # a byte each; "peft" drops before the down product, and not in the transform
    assert kept == 2 * D + R + choices  # h', which the next layer keeps too, s', which the next step reads, and z


def test_gradients_through_a_base_that_changes_states_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    together, plain = EvolvingStateCoupling._is_untouched, causal_lm(llama(), variant="published").train()
    ids, calls = tokens(), []

    def gradients(change) -> dict[str, Tensor]:
        plain.zero_grad()
        handles = [layer.register_forward_pre_hook(change, prepend=True) for layer in plain.decoder.layers[2:]]
        plain(ids, labels=ids).loss.backward()
        for handle in handles:
            handle.remove()
        return {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}

    monkeypatch.setattr(EvolvingStateCoupling, "_is_untouched", lambda self, h: calls.append(together(self, h)) or calls[-1])
    fused = gradients(lambda layer, args: None)
    assert calls == [False, True, True]
    cloned = gradients(lambda layer, args: (args[0].clone(),))
    assert calls[3:] == [False, False, False]
    for name, gradient in fused.items():
        torch.testing.assert_close(cloned[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_an_output_changed_in_place_is_updated_as_it_was() -> None:
    peft, ids = adapted(llama()), tokens()
    for layer in peft.decoder.layers[1:]:
        layer.register_forward_hook(lambda m, args, output: output.mul_(1.5))
    with torch.no_grad():
        expected = peft.forward_with_shadow(ids)[0].logits  # without gradients, the update waits for nothing
    torch.testing.assert_close(peft.forward_with_shadow(ids)[0].logits, expected)


@pytest.mark.parametrize(
    ("variant", "reentrant"),
    [("published", None), ("published", True), ("published", False), ("peft", True), ("peft", False)],
)
def test_a_compiled_or_checkpointed_training_step_has_the_same_gradients(variant: str, reentrant: bool | None) -> None:
    torch._dynamo.reset()
    model, ids = causal_lm(llama(num_hidden_layers=3), variant=variant).train(), tokens()

    def gradients(run) -> dict[str, Tensor]:
        model.zero_grad()
        run(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    if reentrant is None:
        found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compiled_step_has_the_same_gradients(variant: str) -> None:
    torch._dynamo.reset()
    paper = VARIANTS[variant]
    tensors = [draw(2, N, D, seed=1), draw(2, N, D, seed=2), draw(D, R), draw(R, D), *weights_of(paper)]
    compiled = torch.compile(lambda *x: step_without_seed(list(x), paper), backend="aot_eager", fullgraph=True)
    gradients = [
        torch.autograd.grad(sum(o.sum() for o in f(*tensors)), tensors)
        for f in (compiled, lambda *x: step_without_seed(list(x), paper))
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def step_without_seed(tensors: list[Tensor], paper: bool) -> tuple[Tensor, Tensor]:
    h, s, down, up, *rest = tensors
    weights = UpdateWeights(*rest[:6]) if paper else UpdateWeights(*rest[:3])
    return fused_update_injection(h, s, down, up, 0.6, 0.0, paper, weights, None if paper else Norm(*rest[3:]))
