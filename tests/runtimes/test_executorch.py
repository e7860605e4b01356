"""ExecuTorch: answers as transformers does, of prompts longer than what is read at once too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from shadow_peft.export import executorch
from shadow_peft.export.check import agreement, generates
from shadow_peft.export.runtimes import CannotExport, Settings, Source
from tests.runtimes.conftest import tiny_source
from tests.runtimes.needs import need

pytestmark = pytest.mark.filterwarnings("ignore")  # of executorch's own imports


def test_executorch_answers_as_transformers(
    prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("executorch")
    monkeypatch.setattr(executorch, "PART", 8)
    (tmp_path / "hf").mkdir()
    source = tiny_source(tmp_path / "hf", num_hidden_layers=1)
    executorch.convert(source, tmp_path, Settings())
    assert max(map(len, prompts)) > 8
    with executorch.running(tmp_path) as run:
        assert agreement(generates(source.model), run.answer, prompts, 12, {1}).same == len(prompts)
    assert {"model.pte", "config.json", "tokenizer.json"} < {path.name for path in tmp_path.iterdir()}


def test_a_cache_that_forgets_is_refused(source: Source, tmp_path: Path) -> None:
    """A sliding window; this is decided before anything is lowered, so ExecuTorch is not needed."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(vocab_size=300, num_hidden_layers=1, sliding_window=4, **sizes)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(CannotExport, match="the cache of mistral holds something else"):
        executorch.only_tokens_vary({"past_key_values": cache}, model.config)
