"""The variant "readout": what layers read and what they add is corrected, and a read-out blends the shadow in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.layers.output_correction import correct_output, inject_transient, unit_rms
from shadow_peft.layers.readout import ReadoutWeights, ShadowReadoutModel, read_out
from tests.test_formulas import D, R, draw
from tests.tiny_models import causal_lm, llama, tokens


def reference(h: Tensor, s: Tensor, down: Tensor, up: Tensor, alpha: float, normalize: bool) -> tuple[Tensor, Tensor]:
    compared = h / h.pow(2).mean(-1, keepdim=True).sqrt() if normalize else h
    delta = alpha * torch.einsum("btd,dr,re->bte", compared - s, down, up)
    return h + delta, delta


def inputs() -> tuple[Tensor, ...]:
    return draw(2, 3, D, seed=1), draw(2, 3, D, seed=2), draw(D, R), draw(R, D)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_correct_is_the_formula(grad: bool, normalize: bool) -> None:
    h, s, down, up = inputs()
    with torch.set_grad_enabled(grad):
        found = inject_transient(h, s, down, up, 0.4, normalize=normalize)
    for value, expected in zip(found, reference(h, s, down, up, 0.4, normalize), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_correct(dropout: float, normalize: bool) -> None:
    def seeded(h: Tensor, s: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return inject_transient(h, s, down, up, 0.4, dropout, normalize)

    assert torch.autograd.gradcheck(seeded, inputs())


def test_what_is_dropped_is_z() -> None:
    h, s, down, up = draw(64, 64, D, seed=1), draw(64, 64, D, seed=2), draw(D, 1), draw(1, D)
    torch.manual_seed(0)
    ratio = (inject_transient(h, s, down, up, 1.0, 0.25)[1] / reference(h, s, down, up, 1.0, False)[1])[..., 0]
    assert set(ratio.round(decimals=6).unique().tolist()) == {0.0, round(1 / 0.75, 6)}
    assert abs((ratio == 0).double().mean().item() - 0.25) < 0.03


def test_what_is_normalized_has_unit_size_and_zeros_stay_zeros() -> None:
    x = draw(2, 3, D, seed=1) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    torch.testing.assert_close(unit_rms(x).pow(2).mean(-1), torch.ones(2, 3, dtype=x.dtype))
    assert torch.equal(unit_rms(torch.zeros(2, D)), torch.zeros(2, D))


def test_a_normalized_injection_sees_directions_alone() -> None:
    h, s, down, up = inputs()
    for size in (0.01, 100.0):
        found = inject_transient(size * h, unit_rms(s), down, up, 1.0, normalize=True)[1]
        torch.testing.assert_close(found, inject_transient(h, unit_rms(s), down, up, 1.0, normalize=True)[1])


@pytest.mark.parametrize("grad", [True, False])
def test_settle_is_the_formula(grad: bool) -> None:
    h, delta, down, up = inputs()
    out = draw(2, 3, D, seed=3)
    added = out - delta - h
    with torch.set_grad_enabled(grad):
        found = correct_output(out, delta, h, down, up)
    torch.testing.assert_close(found, h + added + added @ down @ up, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_any_layout_of_what_a_layer_returns(grad: bool) -> None:
    h, delta, down, up = inputs()
    out = draw(2, 3, D, seed=3)
    *_, a, b, bias, e, f = readout_inputs()
    maps = ReadoutWeights(a, b, bias, e, f)

    def turned(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2)

    with torch.set_grad_enabled(grad):
        found, expected = (
            correct_output(turned(out), turned(delta), turned(h), down, up),
            correct_output(out, delta, h, down, up),
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(read_out(turned(h), turned(out), maps), read_out(h, out, maps), rtol=1e-12, atol=1e-12)


def test_gradients_of_settle() -> None:
    h, delta, down, up = inputs()
    assert torch.autograd.gradcheck(correct_output, (draw(2, 3, D, seed=3), delta, h, down, up))


def readout_inputs() -> tuple[Tensor, ...]:
    return draw(2, 3, D, seed=1), draw(2, 3, D, seed=2), draw(D, R), draw(R, D), draw(D), draw(D, 2), draw(2, D)


@pytest.mark.parametrize("grad", [True, False])
def test_read_out_is_the_formula(grad: bool) -> None:
    h, s, a, b, bias, down, up = readout_inputs()
    expected = h + torch.tanh(h @ a @ b + bias) * (s - h) + (h - s) @ down @ up
    with torch.set_grad_enabled(grad):
        found = read_out(h, s, ReadoutWeights(a, b, bias, down, up))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_read_out() -> None:
    assert torch.autograd.gradcheck(lambda h, s, *maps: read_out(h, s, ReadoutWeights(*maps)), readout_inputs())


def test_a_fresh_read_out_changes_no_bit() -> None:
    h, s = torch.randn(2, 3, D), torch.randn(2, 3, D)
    assert torch.equal(ShadowReadoutModel(D, R, 2)(h, s), h)


def test_every_part_of_a_fresh_adapter_learns_soon() -> None:
    """The maps behind zeros get a gradient with the second step."""
    torch.manual_seed(0)
    model, ids = ShadowForCausalLM(get_shadow_model(llama(), ShadowConfig(variant="readout"))).train(), tokens()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert not [name for name, p in parameters.items() if not p.grad.any()]


def saved_bytes(run: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps, every storage once, parameters apart."""
    known, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", ["injection_hidden_size", "output_hidden_size"])
def test_a_layer_keeps_thin_products_alone(name: str) -> None:
    """Per token and layer r + q numbers and what the layer added; h + delta is kept by the layer's norm anyway."""

    def kept(layers: int, rank: int) -> int:
        model = causal_lm(llama(num_hidden_layers=layers), variant="readout", **{name: rank}).train()
        ids = tokens(2, 16)
        return saved_bytes(lambda: model(ids, labels=ids, use_cache=False).loss, [*model.parameters(), *model.buffers()])

    def per_layer(rank: int) -> float:
        return (kept(6, rank) - kept(4, rank)) / 2 / 32

    assert per_layer(24) - per_layer(8) == 4 * 16
