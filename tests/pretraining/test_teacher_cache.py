"""What the base teaches, kept on disk: the same loss as computed beside the shadow, and nothing else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file

from shadow_peft import ShadowConfig
from shadow_peft.pretraining import teacher_cache
from shadow_peft.pretraining.shadows import implicit_shadow
from shadow_peft.pretraining.student import Objective, Student
from shadow_peft.pretraining.teacher_cache import TeacherCache, TeacherFacts, digest, fill
from tests.tiny_models import llama

T, K = 12, 8


def numbered(count: int) -> IterableDataset:
    """Blocks of random tokens."""
    ids = torch.randint(3, 96, (50, T), generator=torch.Generator().manual_seed(0)).tolist()
    return IterableDataset.from_generator(lambda: ({"input_ids": ids[i], "index": i} for i in range(count)))


def student(seed: int = 0) -> Student:
    config = ShadowConfig(num_shadow_layers=2, shadow_init="base")
    return Student(implicit_shadow(llama(seed), config), Objective(0.5, 1.0, top_k=K))


def batch(*numbers: int) -> dict[str, torch.Tensor]:
    rows = {row["index"]: row["input_ids"] for row in numbered(50)}
    return {"input_ids": torch.tensor([rows[i] for i in numbers]), "index": torch.tensor(numbers)}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD", 8)


def filled(folder: Path, by: Student, count: int, blocks: int = 50, **changed: Any) -> int:
    facts = TeacherFacts(**{**vars(facts_of(by)), **changed})
    return fill(folder, facts, numbered(blocks), count, by.teacher, batch=4)


def facts_of(by: Student) -> TeacherFacts:
    return TeacherFacts(digest(by.model.base_model), T, K)


@pytest.mark.usefixtures("small_shards")
def test_the_loss_and_its_gradient_are_those_without_a_cache(tmp_path: Path) -> None:
    plain, cached = student().train(), student().train()
    assert filled(tmp_path, plain, 20) == 20
    cached.cache = TeacherCache(tmp_path, facts_of(cached))
    calls: list[int] = []
    cached.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    cached.model.decoder.backbone.register_forward_hook(lambda *_: calls.append(1))
    one, other = (model(**batch(0, 7, 8, 19)) for model in (plain, cached))
    assert not calls, "the base does not run"
    torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(one["terms"], other["terms"], rtol=1e-6, atol=1e-9)
    for outputs in (one, other):
        outputs["loss"].backward()
    for (name, p), q in zip(plain.trained().items(), cached.trained().values(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert torch.equal(cached.eval()(**batch(0, 7))["loss"], plain.eval()(**batch(0, 7))["loss"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.usefixtures("small_shards")
def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    by = student()
    filled(tmp_path, by, 20)
    before = contents(tmp_path)
    assert sorted(before) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert filled(tmp_path, by, 20) == filled(tmp_path, by, 11) == 0
    assert filled(tmp_path, by, 27) == 27 - 16, "the last shard was not full"
    after = contents(tmp_path)
    assert [after[name] == before[name] for name in sorted(before)] == [True, True, False]
    assert filled(tmp_path, by, 1000) == 50 - 24
    assert filled(tmp_path, by, 1000) == 0, "the corpus has no more"
    cache = TeacherCache(tmp_path, facts_of(by))
    for i in (0, 15, 16, 26, 49):
        expected, found = by.eval().teacher(batch(i)["input_ids"]), cache.read(**batch(i))
        assert torch.equal(expected.ids, found.ids)
        torch.testing.assert_close(expected.log_probs, found.log_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_filling_goes_on(tmp_path: Path) -> None:
    by, calls = student(), []

    def until(ids: torch.Tensor) -> Any:
        calls.append(len(ids))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return by.teacher(ids)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "parts", facts_of(by), numbered(50), 30, until, batch=4)
    assert filled(tmp_path / "parts", by, 30) == 30 - 16
    filled(tmp_path / "whole", by, 30)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        whole, parts = (load_file(folder / path.name) for folder in (tmp_path / "whole", tmp_path / "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        assert {name: str(t.dtype) for name, t in whole.items()} == {
            "input_ids": "torch.uint16",
            "ids": "torch.uint16",
            "log_probs": "torch.float32",
        }


@pytest.mark.usefixtures("small_shards")
def test_another_cache_is_refused(tmp_path: Path) -> None:
    by = student()
    filled(tmp_path, by, 20)
    with pytest.raises(ValueError, match="made with another teacher"):
        filled(tmp_path, student(seed=1), 20)
    with pytest.raises(ValueError, match=r"made with another top_k 8 \(here 4\)"):
        filled(tmp_path, by, 20, top_k=4)
    cache = TeacherCache(tmp_path, facts_of(by))
    other = batch(3)["input_ids"].flip(1)
    with pytest.raises(ValueError, match="holds other text in the place of block 3"):
        cache.read(torch.tensor([3]), other)
    with pytest.raises(ValueError, match="lacks block 30"):
        cache.read(**batch(30))
    (tmp_path / "of others").mkdir()
    (tmp_path / "of others" / "file").touch()
    with pytest.raises(ValueError, match=r"There is no teacher\.json"):
        filled(tmp_path / "of others", by, 20)
