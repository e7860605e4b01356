"""The loss of pretraining: its value and its gradient beside autograd's, of plain formulas over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shadow_peft.losses import frozen_head
from shadow_peft.losses.frozen_head import Factors, TopTokens, frozen_head_loss, top_tokens

N, D, V = 21, 6, 40


class Dtypes(TorchDispatchMode):
    """Notes the dtypes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made |= {tensor.dtype for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        return result


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_head, "CHUNK", 8)
    torch.manual_seed(0)


def plain(logits: Tensor, targets: Tensor, teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """CE and KL over k + 1 events, written down with whole distributions."""
    q, p = logits.softmax(-1), teacher_logits.softmax(-1)
    ids = p.topk(k, -1).indices
    q, p = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (q, p))
    known = targets.ne(-100)
    return F.cross_entropy(logits, targets, reduction="sum"), (p * (p / q).log()).sum(-1)[known].sum()


def problem() -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    states = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(D, V, dtype=torch.float64).requires_grad_(False)
    targets = torch.randint(0, V, (N,))
    targets[[3, 20]] = -100
    return states, head, targets, torch.randn(N, V, dtype=torch.float64) * 2


@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("factors", [Factors(1.0, 0.0), Factors(0.0, 1.0), Factors(0.3, 1.7)], ids=str)
@pytest.mark.parametrize("capped", [False, True])
def test_value_and_gradient_are_those_of_the_plain_formulas(k: int, factors: Factors, capped: bool) -> None:
    states, linear, targets, teacher_logits = problem()

    def head(h: Tensor) -> Tensor:
        return 3 * torch.tanh(linear(h) / 3) if capped else linear(h)

    ce, kl = plain(head(states), targets, teacher_logits, k)
    (expected,) = torch.autograd.grad(2 * (factors.cross_entropy * ce + factors.divergence * kl), states)
    total, sums = frozen_head_loss(head, states, targets, top_tokens(teacher_logits, k), factors)
    (2 * total).backward()
    torch.testing.assert_close(sums, torch.stack([ce, kl]).detach())
    torch.testing.assert_close(total, factors.cross_entropy * ce + factors.divergence * kl)
    torch.testing.assert_close(states.grad, expected)
    assert linear.weight.grad is None


def test_all_but_one_token_give_the_divergence_of_the_whole_vocabulary() -> None:
    states, head, targets, teacher_logits = problem()
    _, sums = frozen_head_loss(head, states, targets, top_tokens(teacher_logits, 2 * V), Factors(0.0, 1.0))
    q, p = head(states).log_softmax(-1), teacher_logits.log_softmax(-1)
    by_token = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(sums[1], by_token[targets.ne(-100)].sum().detach())


def test_without_a_teacher_the_divergence_is_zero() -> None:
    states, head, targets, _ = problem()
    total, sums = frozen_head_loss(head, states, targets, None, Factors(1.0, 0.0))
    assert sums[1] == 0
    torch.testing.assert_close(total, F.cross_entropy(head(states), targets, reduction="sum"))


def test_without_gradients_nothing_is_differentiated() -> None:
    states, head, targets, _ = problem()
    with torch.no_grad():
        total, _ = frozen_head_loss(head, states, targets, None, Factors(1.0, 0.0))
    assert not total.requires_grad


def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_slope() -> None:
    states, head, targets, _ = problem()
    total, sums = frozen_head_loss(head, states, targets, top_tokens(head(states).detach(), 7), Factors(0.0, 1.0))
    total.backward()
    assert sums[1].abs() < 1e-9
    assert states.grad.abs().max() < 1e-9


def test_a_teacher_that_is_certain_is_finite() -> None:
    states, head, targets, _ = problem()
    certain = TopTokens(torch.zeros(N, 1, dtype=torch.long), torch.zeros(N, 1, dtype=torch.float64))
    total, sums = frozen_head_loss(head, states, targets, certain, Factors(0.0, 1.0))
    total.backward()
    assert torch.isfinite(sums).all()
    assert torch.isfinite(states.grad).all()


def test_half_precision_is_summed_in_single() -> None:
    states, head, targets, teacher_logits = problem()
    expected, _ = frozen_head_loss(head, states, targets, top_tokens(teacher_logits, 5), Factors(1.0, 1.0))
    half = head.to(torch.bfloat16)
    low = states.detach().to(torch.bfloat16).requires_grad_()
    total, sums = frozen_head_loss(half, low, targets, top_tokens(teacher_logits, 5), Factors(1.0, 1.0))
    total.backward()
    assert sums.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_sum(dtype: torch.dtype) -> None:
    states, head, targets, _ = problem()
    low = states.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype):
        total, sums = frozen_head_loss(head.float(), low, targets, None, Factors(1.0, 0.0))
    assert total.dtype == torch.float32
    assert total == sums[0]
    (gradient,) = torch.autograd.grad(2.0**17 * total, low)
    assert torch.isfinite(gradient).all()


def test_single_precision_needs_no_double() -> None:
    states, head, targets, teacher_logits = problem()
    teacher, low = top_tokens(teacher_logits.float(), 5), states.detach().float().requires_grad_()
    head = head.float()
    with Dtypes() as seen:
        frozen_head_loss(head, low, targets, teacher, Factors(1.0, 1.0))[0].backward()
    assert torch.float32 in seen.made
    assert torch.float64 not in seen.made


@pytest.mark.parametrize("target", [-1, V])
def test_a_target_that_is_no_token_is_an_error(target: int) -> None:
    states, head, targets, _ = problem()
    targets[3] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        frozen_head_loss(head, states, targets, None, Factors(1.0, 0.0))


def test_nobody_is_given_what_a_chunk_saves() -> None:
    states, head, targets, _ = problem()
    saved: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        frozen_head_loss(lambda h: head(h).tanh(), states, targets, None, Factors(1.0, 0.0))
    assert saved == [(N, D)]  # the gradient
