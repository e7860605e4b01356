"""ONNX: one graph that reads any number of tokens behind any number of cached ones, with the names that hub models have.

    input_ids [1, T], position_ids [1, T], past_key_values.N.key|value [1, K, P, D]  ->
    logits [1, T, V], present.N.key|value [1, K, P + T, D]

K are the key-value heads, D their size, P the cached tokens, which may be none. transformers' exporter makes the graph, and
uses operators of the standard alone. `model.onnx` runs in onnxruntime, and in transformers.js in a browser.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from shadow_peft.export.runtimes import CannotExport, Running, Settings, Source

FILE = "model.onnx"

USAGE = """onnxruntime runs `{file}`: `input_ids`, `position_ids` and a cache of keys and values go in, which is empty at
first; `logits` and the longer cache come out. In JavaScript:

```js
import { pipeline } from "@huggingface/transformers";
const generate = await pipeline("text-generation", FOLDER, { dtype: "fp32", subfolder: "" });
```"""

_LARGEST_FILE = 1_800_000_000
"""Bytes of weights that go into the file itself; protobuf ends at 2 GB."""

_CACHE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
_PLAIN = {"input_ids", "position_ids", "logits"}


def convert(source: Source, target: Path, settings: Settings) -> None:
    """Write the graph, tokenizer and configs.

    Raises:
        CannotExport: the exporter cannot trace the model, or its cache is not of keys and values alone.
    """
    import onnx_ir

    program = decode_step("onnx", source.model).program
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = _hub_name(value.name)
    weights = sum(parameter.nbytes for parameter in source.model.parameters())
    onnx_ir.save(program, target / FILE, external_data=f"{FILE}_data" if weights > _LARGEST_FILE else None)
    source.model.config.save_pretrained(target)
    source.model.generation_config.save_pretrained(target)
    source.tokenizer.save_pretrained(target)


@contextmanager
def running(target: Path) -> Iterator[Running]:
    """onnxruntime on the CPU, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(target / FILE, options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    empty = {
        value.name: np.zeros([size if isinstance(size, int) else 0 for size in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    ends = ends_in(target)

    def answer(prompt: list[int], tokens: int) -> list[int]:
        given, read, past, found = prompt, 0, empty, list[int]()
        while len(found) < tokens and not ends.intersection(found[-1:]):
            positions = np.arange(read, read + len(given))[None]
            values = session.run(outputs, {"input_ids": np.array([given]), "position_ids": positions, **past})
            results: dict[str, Any] = dict(zip(outputs, values, strict=True))
            read, given = read + len(given), [int(results["logits"][0, -1].argmax())]
            past = {name: results[name.replace("past_key_values", "present")] for name in past}
            found += given
        return found

    yield Running(answer)


Axes: TypeAlias = Callable[[dict[str, Any], Any], dict[str, Any]]
"""(inputs of a step, config of the model) -> the axes that may be of any size, by input; the only inputs that are kept."""


def decode_step(name: str, model: PreTrainedModel, axes: Axes | None = None) -> Any:
    """A step of generation in a format of transformers' exporters: new tokens behind a cache, both of any length.

    Args:
        name: of the format.
        model: causal language model in float32.
        axes: which axes vary; None lets the exporter find out.

    Raises:
        CannotExport: it cannot be traced.
    """
    from transformers.exporters import AutoExportConfig, AutoHfExporter
    from transformers.exporters.utils import decompose_for_generation

    config = AutoExportConfig.from_dict({"export_format": name, "dynamic": True})
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]]) % model.config.vocab_size
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with _quiet():
            steps = decompose_for_generation(model, sample, multi_token_decode=True)
            part, inputs = steps["decode"]
            if axes is not None:
                config.dynamic_shapes = axes(inputs, model.config)
                inputs = {name: inputs[name] for name in config.dynamic_shapes} | {"use_cache": True}
            return AutoHfExporter.from_config(config).export(part, inputs, config)
    except CannotExport:
        raise
    except Exception as error:  # whatever the tracer does not know
        said = " ".join(str(error).split())[:200]
        raise CannotExport(f"transformers' exporter to {name} cannot trace {type(model).__name__}: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print their progress and warn of their own internals; what they made is run and compared instead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(disabled)


def ends_in(folder: Path) -> set[int]:
    """Tokens that end an answer, by the generation config of a folder."""
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def _hub_name(name: str) -> str:
    """The name that models on the hub have for an input or output of the exporter's graph."""
    cached = _CACHE.fullmatch(name)
    if cached is None and name not in _PLAIN:
        raise CannotExport(f"the cache of this architecture has {name}, and not only keys and values")
    if cached is None:
        return name
    side, layer, part = cached.groups()
    return f"{'past_key_values' if side == 'input' else 'present'}.{layer}.{part}"
