"""The loss is counted by tokens, and finite without targets; test_matrix.py has accumulated steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from tests.tiny_models import causal_lm, classifier, llama, qwen3_classifier, tokens


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = tokens(8, 12), tokens(8, 12)
    for row, length in enumerate((12, 3, 7, 12, 2, 9, 5, 11)):
        labels[row, length:] = -100
    labels[6] = -100
    return ids, labels


def test_the_loss_is_the_weighted_sum_of_two_means() -> None:
    model = causal_lm(llama(), shadow_loss_weight=0.5)
    ids, labels = padded_batch()
    outputs = model(ids, labels=labels)
    means = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        for logits in (outputs.logits, outputs.shadow_logits)
    ]
    torch.testing.assert_close(outputs.loss, means[0] + 0.5 * means[1])
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, outputs.loss)


def test_no_target_is_a_finite_loss_without_gradient() -> None:
    model, ids = causal_lm(llama()), tokens()
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_a_step_without_targets_is_a_finite_loss_without_gradient(count: torch.Tensor | int) -> None:
    model, ids = causal_lm(llama()).train(), tokens()
    outputs = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=count)
    outputs.loss.backward()
    assert [x.item() for x in (outputs.loss, outputs.base_loss, outputs.shadow_loss)] == [0, 0, 0]
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    judge = classifier(qwen3_classifier())
    loss = judge(ids, labels=torch.full((3,), -100), num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in judge.parameters() if p.grad is not None)


@pytest.mark.parametrize("count", [0, torch.tensor(0), -1])
def test_a_count_that_contradicts_the_targets_is_refused(count: torch.Tensor | int) -> None:
    with pytest.raises(ValueError, match=r"num_items_in_batch is (0|-1), but this batch has 27 targets"):
        causal_lm(llama())(tokens(), labels=tokens(), num_items_in_batch=count)
    with pytest.raises(ValueError, match=r"num_items_in_batch is (0|-1), but this batch has 3 targets"):
        classifier(qwen3_classifier())(tokens(), labels=torch.tensor([0, 1, 2]), num_items_in_batch=count)


@pytest.mark.parametrize(
    ("num_labels", "labels", "kind"),
    [
        (1, torch.tensor([0.5, -100.0, 1.0]), "regression"),
        (1, torch.tensor([1, -100, 2]), "regression"),
        (3, torch.tensor([[0.0, 1.0, -100.0]] * 3), "multi_label_classification"),
    ],
)
def test_a_missing_label_is_refused_where_labels_are_numbers(num_labels: int, labels: torch.Tensor, kind: str) -> None:
    model = classifier(qwen3_classifier(num_labels=num_labels))
    with pytest.raises(ValueError, match=f"A label is -100, .* '{kind}'"):
        model(tokens(), labels=labels)


def test_labels_with_some_logits_only_are_refused() -> None:
    model, ids = causal_lm(llama()), tokens()
    assert model(ids, logits_to_keep=2).logits.shape[1] == 2
    torch.testing.assert_close(model(ids, logits_to_keep=2).shadow_logits, model(ids).shadow_logits[:, -2:])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=2)


LABELS = {
    "regression": (1, torch.tensor([0.3, -1.0, 2.0])),
    "regression of several": (2, torch.randn(3, 2, generator=torch.Generator().manual_seed(0))),
    "single label": (3, torch.tensor([0, 2, 1])),
    "multi label": (3, torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])),
}


@pytest.mark.parametrize("kind", LABELS)
def test_classification_is_what_transformers_computes(kind: str) -> None:
    number, labels = LABELS[kind]
    base = qwen3_classifier(num_labels=number)
    base.config.problem_type = "regression" if kind == "regression of several" else None
    model = classifier(base)
    outputs = model(tokens(), labels=labels)
    assert model.config.problem_type == (None if kind != "regression of several" else "regression")
    expected = [
        ForSequenceClassificationLoss(labels, logits, base.config) for logits in (outputs.logits, outputs.shadow_logits)
    ]
    torch.testing.assert_close(outputs.loss, expected[0] + 0.05 * expected[1])


@pytest.mark.parametrize("kind", LABELS)
def test_classification_accumulates(kind: str) -> None:
    number, labels = LABELS[kind]
    base = qwen3_classifier(num_labels=number)
    base.config.problem_type = "regression" if "regression" in kind else None
    model, ids = classifier(base), tokens()
    whole = model(ids, labels=labels).loss
    rows = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=labels.numel()).loss for i in range(3)]
    torch.testing.assert_close(torch.stack(rows).sum(), whole)


def test_unlabelled_rows_of_a_classifier_are_finite() -> None:
    model = classifier(qwen3_classifier())
    assert model(tokens(), labels=torch.full((3,), -100)).loss.item() == 0
    model.config.problem_type = "nonsense"
    with pytest.raises(ValueError, match="problem_type"):
        model(tokens(), labels=torch.zeros(3, dtype=torch.long))


def test_the_loss_comes_first_in_a_tuple() -> None:
    model, ids = causal_lm(llama()), tokens()
    output = model(ids, labels=ids)
    assert output[0] is output.loss
    assert next(iter(output)) == "loss"
    torch.testing.assert_close(model(ids, labels=ids, return_dict=False)[0], output.loss)
    torch.testing.assert_close(model(ids, return_dict=False)[0], output.logits)
