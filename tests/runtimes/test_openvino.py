"""OpenVINO: answers as transformers does, one text after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shadow_peft.export import openvino
from shadow_peft.export.check import agreement, generates
from shadow_peft.export.runtimes import CannotExport, Settings, Source
from tests.runtimes.conftest import tiny_source
from tests.runtimes.needs import need


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("openvino")
    folder = tmp_path_factory.mktemp("openvino")
    openvino.convert(source, folder, Settings())
    return folder


def test_openvino_answers_as_transformers(folder: Path, source: Source, prompts: list[list[int]]) -> None:
    """Twice, since the cache of a text must not reach the next one."""
    with openvino.running(folder) as run:
        found = agreement(generates(source.model), run.answer, [*prompts, prompts[0]], 12, {1})
    assert found.same == found.prompts == len(prompts) + 1


def test_the_graph_keeps_its_cache(folder: Path, source: Source) -> None:
    """Seven tokens at once, and the same in two parts: logits as transformers computes them."""
    import openvino as ov

    compiled = ov.Core().compile_model(folder / openvino.FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request, names = compiled.create_infer_request(), {value.any_name for value in compiled.inputs}
    ids = np.array([[5, 60, 7, 110, 9, 200, 11]])
    expected = source.model(torch.tensor(ids)).logits.detach().numpy()
    for parts in ([slice(0, 7)], [slice(0, 4), slice(4, 7)]):
        request.reset_state()
        for part in parts:
            inputs = {"input_ids": ids[:, part], "position_ids": np.arange(7)[None, part], "beam_idx": np.zeros(1, np.int32)}
            results = request.infer({name: value for name, value in inputs.items() if name in names})
            np.testing.assert_allclose(results["logits"], expected[:, part], atol=1e-4)


def test_a_model_of_one_layer_is_refused(tmp_path: Path) -> None:
    """OpenVINO 2026.4.1 returns old logits for it, once a text was read token by token."""
    need("openvino")
    with pytest.raises(CannotExport, match="a model of one layer"):
        openvino.convert(tiny_source(tmp_path, num_hidden_layers=1), tmp_path, Settings())
