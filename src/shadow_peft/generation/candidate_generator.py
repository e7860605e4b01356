"""The shadow as drafter of its own base: lossless speculative decoding without a second model.

The backbone runs on every token anyway, and `head(s)` guesses the next one. So the shadow drafts k tokens one by one, and
one base pass verifies them all. The pass reuses the very states that drafting computed (`cache.Drafted`), so no token passes
the backbone twice: beside plain decoding, drafting costs one head product per token and what is drafted in vain.

    x_1 .. x_k drafted from q_i = softmax(head(s_i)); verified with p_i of the adapted base
    greedy     keep the x_i that equal the base's choice up to the first that does not, then the base's choice
    sampling   keep x_i with probability min(1, p_i(x_i) / q_i(x_i)); at the first rejection draw from max(0, p - q) / sum

The rule of acceptance is transformers' own (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1). How long a draft gets is
decided by `DraftLength`: another token is drafted while it is expected to win more tokens per cost than the pass so far. So
a shadow that is seldom believed costs little, and one that never is costs nothing. With the schedule "constant", drafts end
only at `num_assistant_tokens` or below `assistant_confidence_threshold`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import CandidateGenerator, GenerateDecoderOnlyOutput, GenerationMode

from shadow_peft.base.task_head import input_embeddings
from shadow_peft.cache import DraftedStates, ShadowCache

if TYPE_CHECKING:
    from shadow_peft.tasks.causal_lm import ShadowForCausalLM

SWITCH = "use_shadow_draft"
"""The generation flag that turns drafting on."""


@dataclass
class DraftStatistics:
    """What became of the drafts of one generation.

    Attributes:
        base_passes: forward passes of the base, the one over the prompt included.
        drafted: tokens that the shadow drafted.
        accepted: drafted tokens that the base accepted.
        accepted_at: how often the token at each position of a draft was accepted.
        drafted_at: how often a token was drafted at each position.
    """

    base_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    drafted_at: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Share of drafted tokens that were accepted; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_base_pass(self) -> float:
        """Tokens won by a base pass: the accepted ones and the base's own."""
        return (self.accepted + self.base_passes) / self.base_passes if self.base_passes else 0.0

    def note(self, drafted: int, accepted: int) -> None:
        """Count one base pass over a draft."""
        self.base_passes += 1
        self.drafted += drafted
        self.accepted += accepted
        for counts, number in ((self.drafted_at, drafted), (self.accepted_at, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for position in range(number):
                counts[position] += 1


@dataclass
class DraftedGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(use_shadow_draft=True, return_dict_in_generate=True)` returns.

    Attributes:
        draft_statistics: what became of the drafts.
    """

    draft_statistics: DraftStatistics | None = None


class DraftingGenerationConfig(GenerationConfig):
    """A generation config in which `use_shadow_draft` counts as a way of assisted generation.

    Attributes:
        use_shadow_draft: True.
        stopping_criteria: what ends the generation under way.
        statistics: what becomes of its drafts.
    """

    use_shadow_draft: bool
    stopping_criteria: StoppingCriteriaList
    statistics: DraftStatistics

    @classmethod
    def of(cls, config: GenerationConfig) -> GenerationConfig:
        """The same config, in this class if drafting is asked for."""
        if getattr(config, SWITCH, None):
            config.__class__ = cls
        return config

    def get_generation_mode(self, assistant_model: Any = None) -> GenerationMode:
        """Assisted generation where greedy decoding or sampling is asked for.

        Raises:
            ValueError: another way of decoding is asked for.
        """
        mode = super().get_generation_mode(assistant_model or self.use_shadow_draft)
        if mode != GenerationMode.ASSISTED_GENERATION:
            raise ValueError(f"use_shadow_draft works with greedy decoding and sampling, not with {mode.value}.")
        return mode


@dataclass
class AcceptanceEstimate:
    """How far the shadow's confidence can be trusted, from what the base made of recent drafts.

    Attributes:
        confident: decaying sum of the confidences of the tokens that were judged.
        accepted: decaying number of them that were accepted; both start as if two tokens had been judged, right by 9/10.
    """

    confident: float = 2.0
    accepted: float = 1.8

    @property
    def trust(self) -> float:
        """How many times as likely as the shadow is sure the base accepts its token."""
        return self.accepted / self.confident

    def judge(self, confidences: list[float], accepted: int) -> None:
        """Take notice of a pass: tokens behind the first rejected one were not judged. Without a draft, trust comes back."""
        if not confidences:
            self.accepted += (self.confident - self.accepted) / 400
            return
        self.confident = 0.9 * self.confident + sum(confidences[: accepted + 1])
        self.accepted = 0.9 * self.accepted + accepted


class DraftLength:
    """Whether the draft of one pass is worth another token, for one row or the mean of several.

    The pass and n drafted tokens cost 1 + n c, in base passes, and are expected to win 1 + a_1 + .. + a_n tokens, a_i being
    the chance that the base accepts all of the first i. Another token is worth it while a / c exceeds the ratio of these
    sums, which is largest then.

    Args:
        cost: c, see `drafting_cost`; 0 for drafts that do not adapt.
        estimate: how far to trust the shadow.
    """

    def __init__(self, cost: float, estimate: AcceptanceEstimate) -> None:
        self._cost, self._trust = cost, estimate.trust
        self._chances: Tensor | float = 1.0
        self._won = self._spent = 1.0

    @property
    def may_begin(self) -> bool:
        """False if no confidence whatever would make a first token worth its cost."""
        return self._trust >= self._cost

    def grows(self, confidence: Tensor) -> bool:
        """Whether the token that is about to be drafted is worth it, by the shadow's confidence `[B]` in it."""
        self._chances = self._chances * (confidence * self._trust).clamp(max=1.0)
        chance = float(self._chances.mean())
        worth = chance * self._spent >= self._cost * self._won
        self._won, self._spent = self._won + chance, self._spent + self._cost
        return worth


class ShadowCandidateGenerator(CandidateGenerator):
    """Drafts with the shadow, for transformers' assisted generation.

    Args:
        model: the model whose base is going to verify.
        config: `num_assistant_tokens`, its schedule, `assistant_confidence_threshold`, `do_sample`, and what the generation
            under way has put there.
        logits_processor: what is done to the base's logits before a token is chosen; done to the shadow's likewise.
        model_kwargs: what travels with the generation: the cache and the attention mask.

    Raises:
        ValueError: the cache cannot give back rejected tokens.
    """

    def __init__(
        self,
        model: ShadowForCausalLM,
        config: DraftingGenerationConfig,
        logits_processor: LogitsProcessorList,
        model_kwargs: dict[str, Any],
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, ShadowCache) or not cache.is_croppable:
            raise ValueError(f"use_shadow_draft needs a cache that can be cropped, this is {cache!r}.")
        self._model = model
        self._cache = cache
        self._config = config
        self._processor = logits_processor
        self._kwargs = model_kwargs
        self._length = int(config.num_assistant_tokens)
        self._max_length = int(config.max_length)
        self._estimate = AcceptanceEstimate()
        self._cost = adaptive_cost(model, config, rows=1)
        self._prompt_is_read = False
        self._confidences: list[float] = []

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The tokens so far `[1, T]` with up to `num_assistant_tokens` more, and the logits `[1, k, V]` they were chosen by.

        The first pass of the base reads the prompt and has nothing to verify.
        """
        self._confidences, self._config.max_length = [], self._max_length
        room = self._max_length - input_ids.shape[1] - 1
        steps = min(self._length, room) if self._prompt_is_read else 0
        self._prompt_is_read = True
        sequence, states, logits, length = input_ids, [], [], DraftLength(self._cost, self._estimate)
        for _ in range(steps if length.may_begin else 0):
            states.append(self._state_of_last(sequence))
            processed = self._logits(sequence, states[-1])
            confidence = processed.softmax(dim=-1).amax(-1)
            if not length.grows(confidence):  # decided before a token is drawn, or sampling would be biased
                break
            logits.append(processed)
            self._confidences.append(float(confidence))
            sequence = torch.cat([sequence, self._choose(processed)], dim=-1)
            if bool(self._config.stopping_criteria(sequence, None).all()):
                self._config.max_length = sequence.shape[1]  # nothing may follow what ends the text, accepted or not
                break
            if self._confidences[-1] < (self._config.assistant_confidence_threshold or 0.0):
                break
        self._cache.drafted = DraftedStates(torch.cat(states, dim=1)) if states else None
        return sequence, torch.stack(logits, dim=1) if logits else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Take notice of what the base accepted."""
        accepted = min(int(num_matches), len(self._confidences))
        self._config.statistics.note(len(self._confidences), accepted)
        self._estimate.judge(self._confidences, accepted)

    def _state_of_last(self, sequence: Tensor) -> Tensor:
        """s of the sequence's last token, `[1, 1, d]`; the backbone's cache holds all tokens before it."""
        mask = self._kwargs.get("attention_mask")
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, sequence.shape[1] - mask.shape[1]), value=1)
        positions = torch.tensor([[sequence.shape[1] - 1]], device=sequence.device) if mask is None else None
        return self._model.peft_model.shadow_step(sequence[:, -1:], mask, positions, self._cache)

    def _logits(self, sequence: Tensor, state: Tensor) -> Tensor:
        """The shadow's processed logits of the next token, `[1, V]`."""
        logits = self._model.shadow_logits(state)[:, -1].to(torch.float32)
        return self._processor(sequence, logits)

    def _choose(self, logits: Tensor) -> Tensor:
        """A drafted token `[1, 1]`."""
        if self._config.do_sample:
            return torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        return logits.argmax(dim=-1, keepdim=True)


class DeviceCosts(NamedTuple):
    """What a forward pass takes on a device, in the time of reading one weight.

    Attributes:
        saturation: tokens whose arithmetic takes as long as reading the weights.
        layer: what it takes to dispatch the operations of a decoder layer.
    """

    saturation: float
    layer: float

    def of_pass(self, weights: int, layers: int, tokens: int) -> float:
        """A pass of a model over so many tokens."""
        return weights * (1 + tokens / self.saturation) + layers * self.layer


DEVICE_COSTS = {"cpu": DeviceCosts(saturation=5, layer=6e5)}
"""A CPU core as measured on a base of 3 M and one of 46 M parameters, see LOG.md."""

ACCELERATOR_COSTS = DeviceCosts(saturation=256, layer=3e8)
"""Estimates: a layer's forty kernels take some 0.3 ms to launch, in which 2 TB/s read 3e8 weights of two bytes."""


def adaptive_cost(model: ShadowForCausalLM, config: GenerationConfig, rows: int) -> float:
    """The cost that decides how long drafts get; 0 where they do not adapt."""
    return 0.0 if config.num_assistant_tokens_schedule == "constant" else drafting_cost(model, rows)


def drafting_cost(model: ShadowForCausalLM, rows: int = 1) -> float:
    """Cost of drafting a token for every row and verifying it, as a share of a base pass over one token per row.

    Drafting is a pass of backbone and head; verifying adds tokens to a pass that is made anyway.
    """
    peft, device = model.peft_model, DEVICE_COSTS.get(model.device.type, ACCELERATOR_COSTS)
    head = _weights(peft.base_model.get_output_embeddings())
    draft, base = (_weights(m) - _weights(input_embeddings(m)) + head for m in (peft.shadow_model, peft.decoder.backbone))
    drafting = device.of_pass(draft, getattr(peft.shadow_model.config, "num_hidden_layers", 1), rows)
    return (drafting + base * rows / device.saturation) / device.of_pass(base, len(peft.decoder.layers), rows)


def _weights(module: nn.Module | None) -> int:
    """Number of parameters of a module, if there is one."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())
