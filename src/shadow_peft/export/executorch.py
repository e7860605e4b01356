"""ExecuTorch: one program for phones and other devices that reads new tokens behind cached ones.

    input_ids [1, T], position_ids [1, T], then keys and values [1, K, P, D] of each layer in turn  ->
    logits [1, T, V], and the same keys and values [1, K, P + T, D]

K are the key-value heads, D their size, P the cached tokens, which may be none. ExecuTorch reserves memory for the largest
shapes: T is at most `PART`, so that longer prompts are read in parts, and P at most `CONTEXT`, or what the model's positions
reach. transformers' exporter makes the program, for the backend XNNPACK. Only T and P are dynamic: with every axis so, as is
the exporter's default, lowering takes longer and prompts end at 64 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from shadow_peft.export.onnx import decode_step, ends_in
from shadow_peft.export.runtimes import CannotExport, Running, Settings, Source

FILE = "model.pte"
PART = 128
"""Most tokens that are read at once."""

CONTEXT = 2048
"""Most cached tokens."""

USAGE = f"""ExecuTorch with the XNNPACK backend runs the method `forward` of `{FILE}`: `input_ids`, `position_ids`, then keys
and values of each layer go in, which are empty at first; `logits` and the longer keys and values come out. A call reads at
most {PART} tokens."""


def convert(source: Source, target: Path, settings: Settings) -> None:
    """Write the program, tokenizer and configs.

    Raises:
        CannotExport: the exporter cannot trace the model, or its cache is not of keys and values alone.
    """
    exported = decode_step("executorch", source.model, only_tokens_vary)
    with (target / FILE).open("wb") as file:
        exported.program.write_to_file(file)
    source.model.config.save_pretrained(target)
    source.model.generation_config.save_pretrained(target)
    source.tokenizer.save_pretrained(target)


def only_tokens_vary(inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """The axes of a step of generation that may be of any size, up to what memory is reserved for.

    Args:
        inputs: of the step.
        config: of the model.

    Raises:
        CannotExport: the cache is not of keys and values alone.
    """
    cache = inputs["past_key_values"]
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise CannotExport(f"the cache of {config.model_type} holds something else than the keys and values of all tokens")
    new, cached = Dim.AUTO(max=PART), Dim.AUTO(max=min(CONTEXT, config.max_position_embeddings))
    return {
        "input_ids": {1: new},
        "position_ids": {1: new},
        "past_key_values": [{2: cached} for _ in range(2 * len(cache.layers))],
    }


@contextmanager
def running(target: Path) -> Iterator[Running]:
    """ExecuTorch's own runtime on the CPU."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(target / FILE).load_method("forward")
    facts, ends = method.metadata, ends_in(target)
    sizes = [facts.input_tensor_meta(number).sizes() for number in range(facts.num_inputs())]  # the largest
    part, empty = sizes[0][1], [torch.zeros(1, heads, 0, width) for _, heads, _, width in sizes[2:]]

    def answer(prompt: list[int], tokens: int) -> list[int]:
        waiting, read, past, found = prompt, 0, empty, list[int]()
        while len(found) < tokens and not ends.intersection(found[-1:]):
            given, waiting = waiting[:part], waiting[part:]
            positions = torch.arange(read, read + len(given))[None]
            logits, *past = method.execute([torch.tensor([given]), positions, *past])
            read += len(given)
            if not waiting:
                found.append(int(logits[0, -1].argmax()))
                waiting = found[-1:]
        return found

    yield Running(answer)
