"""Many stored adapters in bounded memory, and weighted sums of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shadow_peft import AdapterPool, ShadowConfig, ShadowForCausalLM
from tests.test_mixed_batches import OF_ONE_KIND, TOLERANCE, of_one_kind
from tests.test_named_adapters import stir
from tests.tiny_models import causal_lm, llama, tokens


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five stored adapters of two variants."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(5):
        causal_lm(llama(), seed=seed, variant="readout" if seed % 2 else "published").save_pretrained(folder / f"a{seed}")
    return {f"a{seed}": folder / f"a{seed}" for seed in range(5)}


def test_the_least_recently_used_make_room(stored: dict[str, Path]) -> None:
    model = causal_lm(llama(), seed=9)
    pool = AdapterPool(model, stored, capacity=3)
    for names, loaded in (
        (["a0", "a1"], ["a0", "a1"]),
        (["a2", "a0", "a2", "__base__", "default"], ["a1", "a2", "a0"]),
        (["a3"], ["a2", "a0", "a3"]),
        (["a4", "a1", "a2"], ["a4", "a1", "a2"]),
    ):
        with pool.use(names) as used, torch.no_grad():
            assert used == names
            mixed = model(tokens(len(names)), adapter_names=used).logits
        assert pool.loaded == loaded
        assert set(model.peft_model.adapter_configs) == {"default", *loaded}
        for row, name in enumerate(names):
            if name in stored:
                alone = ShadowForCausalLM.from_pretrained(llama(), stored[name])
                torch.testing.assert_close(mixed[row], alone(tokens(len(names))).logits[row], **TOLERANCE)


def test_what_is_in_use_stays(stored: dict[str, Path]) -> None:
    model = causal_lm(llama())
    pool = AdapterPool(model, stored, capacity=2)
    with pool.use(["a0"]):
        for name in ("a1", "a2", "a3"):
            with pool.use([name, "a0"]):
                assert pool.loaded == [name, "a0"]
        with pytest.raises(ValueError, match="3 adapters are in use at once, and the pool holds 2"), pool.use(["a1", "a2"]):
            pass
    with pool.use(["a4", "a2"]):
        assert pool.loaded == ["a4", "a2"]


def test_what_a_pool_refuses(stored: dict[str, Path], tmp_path: Path) -> None:
    model = causal_lm(llama())
    with pytest.raises(ValueError, match="capacity"):
        AdapterPool(model, stored, capacity=0)
    with pytest.raises(ValueError, match="is the active adapter"):
        AdapterPool(model, {"default": tmp_path}, capacity=1)
    pool = AdapterPool(model, {**stored, "gone": tmp_path}, capacity=1)
    with pytest.raises(ValueError, match="no adapter 'nobody'"), pool.use(["nobody"]):
        pass
    with pytest.raises(ValueError, match="holds no shadow adapter"), pool.use(["gone"]):
        pass
    with pool.use(["a1"]):
        assert pool.loaded == ["a1"]


# ---------------------------------------------------------------- weighted sums


def with_one_shadow(variant: str) -> ShadowForCausalLM:
    """Adapters "a", "b" and "c" of one variant that share shadow, update and gate, and differ in all else."""
    model = of_one_kind(variant, gate_hidden_size=6)
    adapters = [model.peft_model.adapter(name) for name in "abc"]
    for adapter in adapters[1:]:
        for part in ("shadow_model", "shadow_update_model"):
            if getattr(adapter, part) is not None:
                getattr(adapter, part).load_state_dict(getattr(adapters[0], part).state_dict())
        if variant == "readout":
            for name in ("gate_down", "gate_up", "gate_bias"):
                source = adapters[0].shadow_readout_model.get_parameter(name)
                adapter.shadow_readout_model.get_parameter(name).data.copy_(source)
    return model


@pytest.mark.parametrize("variant", OF_ONE_KIND)
@torch.no_grad()
def test_every_correction_is_the_weighted_sum(variant: str) -> None:
    """Given the same hidden states; between two layers, corrections add up."""
    model, weights = with_one_shadow(variant), [0.5, 0.8, -0.3]
    model.add_weighted_adapter(list("abc"), weights, "sum")
    generator = torch.Generator().manual_seed(0)
    h, s, out = (torch.randn(2, 5, 32, generator=generator) for _ in range(3))

    def passes(name: str) -> list[torch.Tensor]:
        """What an adapter adds before each layer, behind one that adds `out` - h, and at the end."""
        coupling = model.peft_model.adapter(name).make_coupling(s)
        added = []
        for layer in range(4):
            added.append(coupling.pre_layer(layer, h) - h)
            after = coupling.post_layer(layer, out + added[-1] if variant == "readout" else out)
            added += [] if after is None else [after - out]
        final = coupling.final_hidden(h)
        return added if final is None else [*added, final - h]

    for summed, *parts in zip(passes("sum"), *map(passes, "abc"), strict=True):
        expected = sum(w * part for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(summed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", OF_ONE_KIND)
@torch.no_grad()
def test_halves_of_one_adapter_are_that_adapter(variant: str) -> None:
    model = of_one_kind(variant)
    model.add_weighted_adapter(["b", "b"], [0.25, 0.75], "same")
    mixed = model(tokens(2)[:1].expand(2, -1), adapter_names=["b", "same"])
    torch.testing.assert_close(mixed.logits[0], mixed.logits[1], **TOLERANCE)
    assert model.peft_model.adapter("same").shadow_config.injection_hidden_size == 6
    model.set_adapter("same")
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("second", "weights", "reason"),
    [
        ({"variant": "peft"}, [1, 1], "they differ in variant"),
        ({"dropout": 0.5}, [1, 1], "they differ in dropout"),
        ({}, [1, 1], "their shadows differ"),
        ({}, [1], "a finite weight for each"),
        ({}, [1, float("inf")], "a finite weight for each"),
    ],
)
def test_why_there_is_no_sum(second: dict[str, Any], weights: list[float], reason: str) -> None:
    model = causal_lm(llama())
    model.add_adapter("second", ShadowConfig(**{"dropout": 0.0, **second}))
    stir(model.peft_model.adapter("second"), 2)
    with pytest.raises(ValueError, match=reason):
        model.add_weighted_adapter(["default", "second"], weights, "sum")
    assert "sum" not in model.peft_model.adapter_configs


def test_states_and_gates_that_part() -> None:
    model = with_one_shadow("published")
    model.peft_model.adapter("b").shadow_update_model.live.down.data.mul_(2)
    with pytest.raises(ValueError, match="their states part after the first layer"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    model = with_one_shadow("readout")
    with pytest.raises(ValueError, match="the gate of a read-out is not linear"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.6], "sum")
    for name in "ab":
        readout = model.peft_model.adapter(name).shadow_readout_model
        readout.gate_up.data.zero_()
        readout.gate_bias.data.zero_()
    model.add_weighted_adapter(["a", "b"], [0.5, 0.6], "sum")
