"""OpenVINO: one stateful graph, whose cache stays inside the runtime between two calls.

    input_ids [1, T], position_ids [1, T]  ->  logits [1, T, V]

`reset_state` of the infer request begins a new text. transformers' exporter makes the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shadow_peft.export.onnx import decode_step, ends_in
from shadow_peft.export.runtimes import CannotExport, Running, Settings, Source

FILE = "openvino_model.xml"
USAGE = f"""OpenVINO runs `{FILE}`, with the weights of the `.bin` beside it: `input_ids` and `position_ids` go in, `logits`
come out. The cache is a state of the infer request; `reset_state()` begins a new text."""


def convert(source: Source, target: Path, settings: Settings) -> None:
    """Write the graph, tokenizer and configs.

    Raises:
        CannotExport: the exporter cannot trace the model, or it has one layer.
    """
    import openvino

    if source.model.config.num_hidden_layers == 1:  # seen with 2026.4.1: right logits of the first text alone
        raise CannotExport("OpenVINO gives a model of one layer old logits for every text but the first; use --to onnx")

    openvino.save_model(decode_step("openvino", source.model).program, target / FILE, compress_to_fp16=False)
    source.model.config.save_pretrained(target)
    source.model.generation_config.save_pretrained(target)
    source.tokenizer.save_pretrained(target)


@contextmanager
def running(target: Path) -> Iterator[Running]:
    """OpenVINO on the CPU in float32, on as many threads as torch has."""
    import openvino

    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
    }
    compiled = openvino.Core().compile_model(target / FILE, "CPU", hints)
    request, ends = compiled.create_infer_request(), ends_in(target)
    names = {value.any_name for value in compiled.inputs}

    def answer(prompt: list[int], tokens: int) -> list[int]:
        request.reset_state()
        given, read, found = prompt, 0, list[int]()
        while len(found) < tokens and not ends.intersection(found[-1:]):
            inputs: dict[str, Any] = {
                "input_ids": np.array([given]),
                "position_ids": np.arange(read, read + len(given))[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            results = request.infer({name: value for name, value in inputs.items() if name in names})
            read, given = read + len(given), [int(results["logits"][0, -1].argmax())]
            found += given
        return found

    yield Running(answer)
