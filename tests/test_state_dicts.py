"""State dicts under whatever holds the model (accelerate, safetensors, DDP, averages, parents): all ways back are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from tests.test_base_adapters import shadowed, with_lora
from tests.tiny_models import adapted, causal_lm, classifier, llama, qwen3, qwen3_classifier, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
VARIANTS = ("published", "peft", "readout")
MAKERS: dict[str, Callable[..., Any]] = {
    "causal": lambda seed, variant: causal_lm(llama(), seed=seed, variant=variant, modules_to_save=["lm_head"]),
    "classifier": lambda seed, variant: classifier(qwen3_classifier(seed=seed), seed=seed, variant=variant),
    "adapter": lambda seed, variant: adapted(llama(), seed=seed, variant=variant),
    "LoRA": lambda seed, variant: shadowed(with_lora(seed), variant=variant).eval(),
    "explicit": lambda seed, variant: adapted(
        llama(), seed=seed, variant=variant, shadow_model=qwen3(seed, hidden_size=16, num_hidden_layers=2)
    ),
}


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def one(kind: str, variant: str) -> Any:
    """A model with weights of its own."""
    return other_weights(MAKERS[kind](1, variant))


@pytest.fixture
def other(kind: str, variant: str) -> Any:
    """One of the same make with other weights, on a base with the same."""
    made = MAKERS[kind](1, variant)
    for tensor in made.state_dict(keep_vars=True).values():
        assert not tensor.requires_grad
    return made


def other_weights(model: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        model.load_state_dict(
            {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
        )
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens()).logits
    return result


def same(loaded: Any, model: Any) -> None:
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))


class Holder(nn.Module):
    """A module of somebody's own with a model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"model": model})


def test_entries_are_whole_tensors(one: Any) -> None:
    storages = set()
    for name, tensor in one.state_dict().items():
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
        storages.add(tensor.untyped_storage().data_ptr())
    assert len(storages) == len(one.state_dict())


@pytest.mark.parametrize("shards", ["10GB", "64KB"])
def test_accelerate_save_model(shards: str, one: Any, other: Any, tmp_path: Path) -> None:
    Accelerator(cpu=True).save_model(one, tmp_path, max_shard_size=shards)
    load_checkpoint_in_model(other, tmp_path)
    same(other, one)


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_save_state(safe: bool, one: Any, other: Any, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(one)
    expected = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    accelerator.save_state(tmp_path, safe_serialization=safe)
    prepared.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in expected.items()})
    accelerator.load_state(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in prepared.state_dict().items())
    if safe:
        load_model(other, tmp_path / "model.safetensors")
        same(other, one)


def test_safetensors(one: Any, other: Any, tmp_path: Path) -> None:
    save_model(one, str(tmp_path / "model"))
    assert load_file(tmp_path / "model").keys() == one.state_dict().keys()
    load_model(other, tmp_path / "model")
    same(other, one)
    other_weights(one)
    save_file(one.state_dict(), tmp_path / "file")
    other.load_state_dict(load_file(tmp_path / "file"))
    same(other, one)


def test_torch_save(one: Any, other: Any, tmp_path: Path) -> None:
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    same(other, one)


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_ddp(one: Any, other: Any) -> None:
    if not any(p.requires_grad for p in one.parameters()):
        pytest.skip("nothing to train")
    wrapped = DistributedDataParallel(one)
    assert all(name.startswith("module.") for name in wrapped.state_dict())
    receiving = DistributedDataParallel(other)
    assert receiving.load_state_dict(wrapped.state_dict()) == ([], [])
    same(other, one)
    other_weights(one)
    other.load_state_dict(wrapped.state_dict())
    same(other, one)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [AveragedModel, Holder, torch.compile])
def test_modules_around_it(wrap: Callable[[Any], nn.Module], one: Any, other: Any) -> None:
    around, receiving = wrap(one), wrap(other)
    inner: Any = next(m for m in receiving.modules() if type(m) is type(one))
    base = {name: (p.data_ptr(), p.clone()) for name, p in inner.named_parameters() if "base_model." in name}
    state = around.state_dict()
    assert not [name for name in state if "embed_tokens" in name and "shadow" not in name], "nothing of the base"
    assert receiving.load_state_dict(state) == ([], [])
    same(inner, one)
    for name, parameter in inner.named_parameters():
        if "base_model." in name and "lora_" not in name:
            assert (parameter.data_ptr(), True) == (base[name][0], torch.equal(parameter, base[name][1]))
    same(inner, one)
    assert receiving.load_state_dict(state, assign=True) == ([], [])
    same(inner, one)


def test_what_is_missing_or_unknown_in_a_parent(one: Any, other: Any) -> None:
    around, receiving = Holder(one), Holder(other)
    state = dict(around.state_dict())
    name = next(reversed([name for name in state if name.startswith("inner.")]))
    value = state.pop(name)
    with pytest.raises(RuntimeError, match="Missing key"):
        receiving.load_state_dict(state)
    missing, unexpected = receiving.load_state_dict(state, strict=False)
    assert (len(missing), unexpected) == (1, [])
    assert missing[0].endswith(name.rpartition("inner.model.")[2])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        receiving.load_state_dict({**state, name: value, "inner.model.nonsense": value})
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="has shape"):
        receiving.load_state_dict({**state, name: torch.zeros(1)}, strict=False)
    assert all(torch.equal(tensor, before[n]) for n, tensor in other.state_dict().items())
    receiving.load_state_dict({**state, name: value})
    same(other, one)


def test_two_models_on_one_parent(variant: str) -> None:
    def pair(seed: int) -> nn.ModuleList:
        base = llama()
        return nn.ModuleList([causal_lm(base, seed=seed, variant=variant), adapted(base, seed=seed + 1), nn.Linear(2, 2)])

    sending, receiving = pair(1), pair(5)
    assert receiving.load_state_dict(sending.state_dict()) == ([], [])
    for i in (0, 1):
        same(receiving[i], sending[i])
