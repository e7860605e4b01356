"""What a method costs: bytes of a training step, those kept for the backward pass, and decoding beside the bare base."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import devices

PROMPTS, MOST_TOKENS, REPEATS = 6, 40, 1


def bytes_saved(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of the storages that a forward pass keeps for its backward pass, parameters and inputs left out."""
    model.train()
    others = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = tensor  # held, so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**inputs).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    model.zero_grad()
    return size


def step_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of all tensors of a forward and a backward pass, at the moment when they are most; parameters left out."""
    model.train()

    def step() -> None:
        model(**inputs).loss.backward()

    step()  # what is made once and stays
    model.zero_grad()
    size = devices.most_allocated(step, next(model.parameters()).device.type)
    model.zero_grad()
    return size


@torch.no_grad()
def decoding(model: Any, base: Any, prompts: list[list[int]]) -> dict[str, float]:
    """Greedy decoding of the first prompts at batch 1, drafted and undrafted, beside the bare base, taking turns.

    Returns:
        `tokens_per_pass`, `acceptance`: of drafting. `drafted_time`, `undrafted_time`: seconds per new token over the bare
        base's, of medians over prompts after a first round; the bare base writes as many tokens as the adapted one did.
    """
    model.eval()
    seconds: dict[str, list[float]] = {"bare": [], "undrafted": [], "drafted": []}
    passes = accepted = drafted = 0
    for prompt in prompts[:PROMPTS]:
        ids = torch.tensor([prompt], device=model.device)
        for repeat in range(REPEATS + 1):
            took, output = _timed(model, ids, MOST_TOKENS, use_shadow_draft=True)
            new = output.sequences.shape[1] - ids.shape[1]
            plain, _ = _timed(model, ids, MOST_TOKENS)
            bare, _ = _timed(base, ids, new, min_new_tokens=new)
            if repeat:  # the first round warms up
                for name, value in (("drafted", took), ("undrafted", plain), ("bare", bare)):
                    seconds[name].append(value / new)
        statistic = output.draft_statistics
        passes += statistic.base_passes
        accepted += statistic.accepted
        drafted += statistic.drafted
    times = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_pass": (accepted + passes) / passes, "acceptance": accepted / max(1, drafted),
        "drafted_time": times["drafted"] / times["bare"], "undrafted_time": times["undrafted"] / times["bare"],
        "bare_seconds_per_token": times["bare"],
    }  # fmt: skip


def _timed(model: Any, ids: Tensor, tokens: int, **options: Any) -> tuple[float, Any]:
    """Seconds of a generation, of the processor or of a GPU's clock, the prompt's pass included, and its output."""
    started = devices.seconds(ids.device.type)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return devices.seconds(ids.device.type) - started, output
