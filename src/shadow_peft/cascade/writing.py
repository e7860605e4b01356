"""A cascade of causal language models: prompts in, texts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.cascade.answers import Answer, AnsweredBy, Policy
from shadow_peft.cascade.decoding import ShadowRun, run_attached, run_shadow
from shadow_peft.cascade.outcomes import Outcome, Quality, takeover_positions
from shadow_peft.cascade.remote import Prompt, RemoteError, RemoteModel
from shadow_peft.cascade.signals import Takeover
from shadow_peft.cascade.trace import Recorder
from shadow_peft.tasks.causal_lm import ShadowForCausalLM


class Writers:
    """The shadow and what takes over from it.

    Args:
        shadow: a model that answers alone, or a task model in the mode "shadow_only".
        attached: the task model in the mode "base_shadow", or a remote one.
        tokenizer: of both.
        config: how to decode, with `max_new_tokens` and `pad_token_id`.
    """

    def __init__(
        self,
        shadow: PreTrainedModel,
        attached: ShadowForCausalLM | RemoteModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
    ) -> None:
        self.shadow, self.attached, self.tokenizer, self.config = shadow, attached, tokenizer, config

    # ---------------------------------------------------------------- answering

    def answers(self, prompts: Sequence[Prompt], policy: Policy) -> list[Answer]:
        """One answer a prompt."""
        if isinstance(self.attached, RemoteModel):
            return self._with_remote(prompts, self.attached, policy)
        if policy.takeover == "token":
            return [self._by_token(prompt, self.attached, policy) for prompt in prompts]
        return self._by_answer(prompts, self.attached, policy)

    def _by_answer(self, prompts: Sequence[Prompt], attached: ShadowForCausalLM, policy: Policy) -> list[Answer]:
        """The shadow answers all prompts of a batch; the attached model those that it is unsure of."""
        ids, mask = self._encode(prompts)
        run = run_shadow(self.shadow, ids, mask, self.config, keep_states=True)
        answers = [self._of_shadow(run, row, policy) for row in range(len(prompts))]
        unsure = [row for row, trace in enumerate(run.traces) if policy.decide(trace)[0] is not None]
        if not unsure:
            return answers
        cache = run.cache_of(unsure, ids.shape[1], attached.get_base_model())
        texts = run_attached(attached, ids[unsure], mask[unsure], self.config, cache)
        for row, tokens in zip(unsure, texts, strict=True):
            answers[row] = replace(
                answers[row],
                text=self._text(tokens),
                answered_by=AnsweredBy.ATTACHED,
                shadow_tokens=0,
                tokens=tuple(tokens),
            )
        return answers

    def _by_token(self, prompt: Prompt, attached: ShadowForCausalLM, policy: Policy) -> Answer:
        """The shadow writes up to the first token that it is unsure of; the attached model goes on from there."""
        ids, mask = self._encode([prompt])
        column = Recorder.COLUMNS[policy.scorer.signal]

        def stops(latest: Tensor) -> Tensor:
            levels = policy.scorer.level(latest[:, column].cpu().numpy())
            return torch.from_numpy(levels < policy.threshold).to(latest.device)

        run = run_shadow(self.shadow, ids, mask, self.config, stops=stops, keep_states=True)
        place, confidence = policy.decide(run.traces[0])
        if place is None:
            return self._of_shadow(run, 0, policy)
        own = run.written[0][:place]
        cache = run.cache_of([0], ids.shape[1] + place, attached.get_base_model())
        tokens = torch.cat([ids, ids.new_tensor([own])], dim=1) if own else ids
        (added,) = run_attached(attached, tokens, torch.ones_like(tokens), self.config, cache, written=place)
        who = AnsweredBy.SHADOW_THEN_ATTACHED if own else AnsweredBy.ATTACHED
        return Answer(self._text(own + added), who, confidence, place, tuple(own + added))

    def _with_remote(self, prompts: Sequence[Prompt], remote: RemoteModel, policy: Policy) -> list[Answer]:
        drafts = zip(prompts, self.shadow_answers(prompts, policy), strict=True)
        return [answer if place is None else self.ask(remote, prompt, answer, place) for prompt, (answer, place) in drafts]

    def shadow_answers(self, prompts: Sequence[Prompt], policy: Policy) -> list[tuple[Answer, int | None]]:
        """The shadow's answers, written to their ends in case that a remote model fails.

        Returns:
            For each prompt its answer, and the token from which the other model is to write, or None.
        """
        ids, mask = self._encode(prompts)
        run = run_shadow(self.shadow, ids, mask, self.config)
        return [(self._of_shadow(run, row, policy), policy.decide(run.traces[row])[0]) for row in range(len(prompts))]

    def ask(self, remote: RemoteModel, prompt: Prompt, answer: Answer, place: int) -> Answer:
        """The remote model's answer in the place of the shadow's, from a token on; the shadow's, marked, where it fails."""
        assert answer.tokens is not None
        try:
            text = self._remote_text(remote, prompt, list(answer.tokens[:place]))
        except RemoteError as error:
            return replace(answer, answered_by=AnsweredBy.SHADOW_REMOTE_FAILED, reason=str(error))
        who = AnsweredBy.SHADOW_THEN_REMOTE if place else AnsweredBy.REMOTE
        return Answer(text, who, answer.confidence, place)

    def _remote_text(self, remote: RemoteModel, prompt: Prompt, own: list[int]) -> str:
        """What the shadow has written, and the remote model's continuation."""
        limit = self.config.max_new_tokens
        written = self._text(own)
        return written + remote.complete(prompt, written, None if limit is None else limit - len(own))

    def _of_shadow(self, run: ShadowRun, row: int, policy: Policy) -> Answer:
        tokens, confidence = run.written[row], policy.decide(run.traces[row])[1]
        return Answer(self._text(tokens), AnsweredBy.SHADOW, confidence, len(tokens), tuple(tokens))

    # ---------------------------------------------------------------- measuring

    def outcomes(
        self, prompts: Sequence[Prompt], references: Sequence[str], quality: Quality, takeover: Takeover
    ) -> list[Outcome]:
        """What each answer is worth, wherever the attached model takes over.

        Raises:
            RemoteError: the remote model failed; a calibration needs all of its answers.
        """
        ids, mask = self._encode(prompts)
        run = run_shadow(self.shadow, ids, mask, self.config)
        found = []
        whole = self._attached_texts(prompts, ids, mask)
        for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            takeovers = {0: quality(whole[row], reference)}
            if takeover == "token":
                places = takeover_positions(run.traces[row])[1:]
                texts = self._continued(prompt, ids[row][mask[row].bool()].tolist(), run.written[row], places)
                takeovers |= {place: quality(text, reference) for place, text in zip(places, texts, strict=True)}
            found.append(Outcome(run.traces[row], quality(self._text(run.written[row]), reference), takeovers))
        return found

    def _attached_texts(self, prompts: Sequence[Prompt], ids: Tensor, mask: Tensor) -> list[str]:
        """The attached model's own answers."""
        if isinstance(self.attached, RemoteModel):
            return [self._remote_text(self.attached, prompt, []) for prompt in prompts]
        return [self._text(tokens) for tokens in run_attached(self.attached, ids, mask, self.config)]

    def _continued(self, prompt: Prompt, ids: list[int], written: list[int], places: list[int]) -> list[str]:
        """The answers in which the attached model goes on from these places of what the shadow wrote."""
        if isinstance(self.attached, RemoteModel):
            return [self._remote_text(self.attached, prompt, written[:place]) for place in places]
        if not places:
            return []
        most = self.config.max_new_tokens
        tokens, mask = self._padded([ids + written[:place] for place in places])
        added = run_attached(self.attached, tokens, mask, self.config, written=places[0])
        return [self._text((written[:p] + new)[:most]) for p, new in zip(places, added, strict=True)]

    # ---------------------------------------------------------------- texts

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Token ids and mask `[B, P]`, padded on the left.

        Raises:
            ValueError: a prompt without a token.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        if not all(rows):
            raise ValueError("A prompt is empty: there is nothing to go on with.")
        return self._padded(rows)

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        pad = self.config.pad_token_id
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        device = self.shadow.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        encoded: Any = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
