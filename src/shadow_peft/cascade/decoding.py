"""Running the two networks: the shadow alone, and the attached model on the states that the shadow has computed.

    shadow     reads x_1 .. x_P and writes y_1, y_2, ..; its states s and its cache are kept
    attached   reads the same tokens; its backbone has read them already (`cache.DraftedStates`), so only the base runs

Both run through `generate` itself, so any processor and way of sampling of a generation config is theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from shadow_peft.cache import DraftedStates, ShadowCache
from shadow_peft.cascade.trace import Recorder, Trace
from shadow_peft.tasks.causal_lm import ShadowForCausalLM


@dataclass
class ShadowRun:
    """What the shadow wrote behind B prompts.

    Attributes:
        prompts: token ids `[B, P]`, padded on the left.
        mask: `[B, P]`.
        written: for each row its tokens, the one that ends the answer included.
        traces: what the shadow thought of them.
        states: shadow states `[B, N, d]` of the N tokens that it has read; None of a model without a base.
        cache: the backbone's cache of these tokens, or None.
    """

    prompts: Tensor
    mask: Tensor
    written: list[list[int]]
    traces: list[Trace]
    states: Tensor | None = None
    cache: Cache | None = None

    def cache_of(self, rows: list[int], length: int, base: PreTrainedModel) -> ShadowCache | None:
        """A cache in which the backbone has read the first `length` tokens of these rows and the base nothing.

        It takes the run's own cache, so it can be asked for once. None where that cannot be cut to the length: then the
        backbone has to read again.
        """
        cache, states = self.cache, self.states
        self.cache = self.states = None
        if cache is None or states is None or type(cache) is not DynamicCache:
            return None
        surplus = states.shape[1] - length
        if surplus and not all(type(layer) is DynamicLayer for layer in cache.layers):  # others forget what they need
            return None
        if len(rows) != len(self.written):
            cache.batch_select_indices(torch.tensor(rows, device=states.device))
        if surplus:
            cache.crop(-surplus)
        return unread_by_base(base, cache, states[rows, :length])


@torch.no_grad()
def run_shadow(
    shadow: PreTrainedModel,
    prompts: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    *,
    stops: Callable[[Tensor], Tensor] | None = None,
    keep_states: bool = False,
) -> ShadowRun:
    """Let the shadow write.

    Args:
        shadow: a model that answers alone, or a task model in the mode "shadow_only".
        prompts: token ids `[B, P]`, padded on the left.
        mask: `[B, P]`.
        config: how to decode.
        stops: ends rows at the token just written, see `Recorder`.
        keep_states: keep states and cache for the attached model.
    """
    recorder = Recorder(stops)
    settings = {"return_dict_in_generate": True, "output_hidden_states": keep_states, "use_shadow_draft": None}
    output: Any = shadow.generate(
        inputs=prompts,
        attention_mask=mask,
        generation_config=changed(config, **settings),
        logits_processor=LogitsProcessorList([recorder.processor]),
        stopping_criteria=StoppingCriteriaList([recorder.criterion]),
    )
    new: list[list[int]] = output.sequences[:, prompts.shape[1] :].tolist()
    written = [tokens[: _length(tokens, config)] for tokens in new]
    run = ShadowRun(prompts, mask, written, recorder.traces([len(tokens) for tokens in written]))
    if keep_states:
        run.states = torch.cat([step[0] for step in output.hidden_states], dim=1)
        run.cache = getattr(output.past_key_values, "shadow", None)
    return run


@torch.no_grad()
def run_attached(
    model: ShadowForCausalLM,
    tokens: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    cache: ShadowCache | None = None,
    written: int = 0,
) -> list[list[int]]:
    """Let the attached model write.

    Args:
        model: the task model in the mode "base_shadow".
        tokens: token ids `[B, N]`, padded on the left: the prompts, and what the shadow has written.
        mask: `[B, N]`.
        config: how to decode.
        cache: what the shadow has read of these tokens; None lets the backbone read them too.
        written: how many of the tokens the shadow has written; they count as new tokens.

    Returns:
        For each row the tokens that it added, the one that ends the answer included.
    """
    settings: dict[str, Any] = {"return_dict_in_generate": False}
    if config.max_new_tokens is not None:
        settings["max_new_tokens"] = config.max_new_tokens - written
    if config.min_new_tokens:
        settings["min_new_tokens"] = max(0, config.min_new_tokens - written)
    given = {} if cache is None else {"past_key_values": cache}
    output: Any = model.generate(inputs=tokens, attention_mask=mask, generation_config=changed(config, **settings), **given)
    new: list[list[int]] = output[:, tokens.shape[1] :].tolist()
    return [row[: _length(row, config)] for row in new]


def unread_by_base(base: PreTrainedModel, cache: Cache, states: Tensor) -> ShadowCache:
    """A cache of both networks in which the backbone has read N tokens, with these states `[B, N, d]`, and the base none."""
    shared = ShadowCache(DynamicCache(config=base.config.get_text_config(decoder=True)), cache)
    shared.drafted = DraftedStates(states)
    return shared


def changed(config: GenerationConfig, **settings: Any) -> GenerationConfig:
    """A copy of a generation config with other settings."""
    copied = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(copied, name, value)
    return copied


def _length(tokens: list[int], config: GenerationConfig) -> int:
    """Number of tokens up to the one that ends the answer; all of them where none does."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
