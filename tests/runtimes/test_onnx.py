"""ONNX: onnxruntime answers as transformers does, on names that hub models have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from shadow_peft.export import onnx
from shadow_peft.export.check import agreement, generates
from shadow_peft.export.runtimes import CannotExport, Settings, Source
from tests.runtimes.needs import need


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("onnx")
    folder = tmp_path_factory.mktemp("onnx")
    onnx.convert(source, folder, Settings())
    return folder


def test_onnxruntime_answers_as_transformers(folder: Path, source: Source, prompts: list[list[int]]) -> None:
    with onnx.running(folder) as run:
        assert agreement(generates(source.model), run.answer, prompts, 12, {1}).same == len(prompts)


def test_the_graph_reads_many_tokens_behind_many(folder: Path, source: Source) -> None:
    """Seven tokens at once, and the same in two parts: logits as transformers computes them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    layers = source.model.config.num_hidden_layers
    caches = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    assert [value.name for value in session.get_inputs()] == ["input_ids", "position_ids", *caches]
    outputs = [value.name for value in session.get_outputs()]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    ids = np.array([[5, 60, 7, 110, 9, 200, 11]])
    heads, size = source.model.config.num_key_value_heads, source.model.config.head_dim
    past = dict.fromkeys(caches, np.zeros((1, heads, 0, size), np.float32))
    expected = source.model(torch.tensor(ids)).logits.detach().numpy()
    logits, *_ = session.run(outputs, {"input_ids": ids, "position_ids": np.arange(7)[None], **past})
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    _, *present = session.run(outputs, {"input_ids": ids[:, :4], "position_ids": np.arange(4)[None], **past})
    past = dict(zip(caches, present, strict=True))
    logits, *_ = session.run(outputs, {"input_ids": ids[:, 4:], "position_ids": np.arange(4, 7)[None], **past})
    np.testing.assert_allclose(logits, expected[:, 4:], atol=1e-4)


def test_a_cache_of_another_kind_is_refused(source: Source, tmp_path: Path) -> None:
    need("onnx")
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(CannotExport, match=r"MambaForCausalLM|the cache of this architecture has"):
        onnx.convert(Source(model, source.tokenizer, tmp_path), tmp_path, Settings())
    assert list(tmp_path.iterdir()) == []
