"""A cascade of classifiers: prompts in, names of classes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from shadow_peft.cache import DraftedStates, ShadowCache
from shadow_peft.cascade.answers import Answer, AnsweredBy, Policy
from shadow_peft.cascade.decoding import unread_by_base
from shadow_peft.cascade.outcomes import Outcome, Quality
from shadow_peft.cascade.remote import Prompt, RemoteError, RemoteModel
from shadow_peft.cascade.signals import Takeover
from shadow_peft.cascade.trace import class_traces
from shadow_peft.tasks.sequence_classification import ShadowForSequenceClassification


class Classifiers:
    """The shadow and what takes over from it.

    Args:
        shadow: a classifier that answers alone, or a task model in the mode "shadow_only".
        attached: the task model in the mode "base_shadow", or a remote model, which answers with the name of a class.
        tokenizer: of both.

    Raises:
        ValueError: there are no classes to tell apart.
    """

    def __init__(
        self,
        shadow: PreTrainedModel,
        attached: ShadowForSequenceClassification | RemoteModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        config = shadow.config.get_text_config()
        if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
            raise ValueError("A cascade of classifiers needs two classes or more, of which one is right.")
        self.shadow, self.attached, self.tokenizer = shadow, attached, tokenizer
        self.names = [str(config.id2label[index]) for index in range(config.num_labels)]

    def answers(self, prompts: Sequence[Prompt], policy: Policy) -> list[Answer]:
        """One class a prompt.

        Raises:
            ValueError: a takeover per token; a class has one.
        """
        if policy.takeover == "token":
            raise ValueError("A class is decided at once: a cascade of classifiers takes over per answer.")
        ids, mask = self._encode(prompts)
        logits, cache = self._run_shadow(ids, mask)
        traces = class_traces(logits)
        classes = logits.argmax(-1).tolist()
        answers = [self._answer(c, AnsweredBy.SHADOW, policy.decide(t)[1]) for c, t in zip(classes, traces, strict=True)]
        unsure = [row for row, trace in enumerate(traces) if policy.decide(trace)[0] is not None]
        if isinstance(self.attached, RemoteModel):
            for row in unsure:
                answers[row] = self._ask_remote(self.attached, prompts[row], answers[row])
        elif unsure:
            for row, found in zip(unsure, self._run_attached(ids, mask, unsure, cache), strict=True):
                answers[row] = self._answer(found, AnsweredBy.ATTACHED, answers[row].confidence)
        return answers

    def outcomes(
        self, prompts: Sequence[Prompt], references: Sequence[str], quality: Quality, takeover: Takeover
    ) -> list[Outcome]:
        """What the class of either is worth.

        Raises:
            RemoteError: the remote model failed.
            ValueError: a takeover per token.
        """
        if takeover == "token":
            raise ValueError("A class is decided at once: a cascade of classifiers takes over per answer.")
        ids, mask = self._encode(prompts)
        logits, cache = self._run_shadow(ids, mask)
        if isinstance(self.attached, RemoteModel):
            others = [self._remote_class(self.attached, prompt) for prompt in prompts]
        else:
            others = self._run_attached(ids, mask, list(range(len(prompts))), cache)
        rows = zip(class_traces(logits), logits.argmax(-1).tolist(), others, references, strict=True)
        return [Outcome(t, quality(self.names[a], r), {0: quality(self.names[b], r)}) for t, a, b, r in rows]

    def _answer(self, index: int, who: AnsweredBy, confidence: float) -> Answer:
        return Answer(self.names[index], who, confidence, int(who is AnsweredBy.SHADOW), (index,))

    # ---------------------------------------------------------------- running

    @torch.no_grad()
    def _run_shadow(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ShadowCache | None]:
        """Logits `[B, C]` of the shadow, and for a task model what it has read."""
        if not isinstance(self.shadow, ShadowForSequenceClassification):
            logits: Tensor = self.shadow(input_ids=ids, attention_mask=mask).logits
            return logits, None
        output = self.shadow(input_ids=ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
        own = getattr(output.past_key_values, "shadow", None)
        if type(own) is not DynamicCache:
            return output.logits, None
        return output.logits, unread_by_base(self.shadow.get_base_model(), own, output.hidden_states[0])

    @torch.no_grad()
    def _run_attached(self, ids: Tensor, mask: Tensor, rows: list[int], cache: ShadowCache | None) -> list[int]:
        """The classes of these rows, from the attached model; its backbone has read them where there is a cache."""
        assert not isinstance(self.attached, RemoteModel)
        if cache is not None and len(rows) < len(ids):
            assert cache.drafted is not None
            assert cache.shadow is not None
            cache.shadow.batch_select_indices(torch.tensor(rows, device=ids.device))
            cache.drafted = DraftedStates(cache.drafted.states[rows])
        output = self.attached(input_ids=ids[rows], attention_mask=mask[rows], past_key_values=cache, use_cache=True)
        classes: list[int] = output.logits.argmax(-1).tolist()
        return classes

    def _ask_remote(self, remote: RemoteModel, prompt: Prompt, answer: Answer) -> Answer:
        try:
            return self._answer(self._remote_class(remote, prompt), AnsweredBy.REMOTE, answer.confidence)
        except RemoteError as error:
            return replace(answer, answered_by=AnsweredBy.SHADOW_REMOTE_FAILED, reason=str(error))

    def _remote_class(self, remote: RemoteModel, prompt: Prompt) -> int:
        said = remote.complete(prompt).strip()
        if said not in self.names:
            raise RemoteError(f"the answer {said[:40]!r} is no class")
        return self.names.index(said)

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Token ids and mask `[B, T]`, padded on the right, as classifiers are used to.

        Raises:
            ValueError: messages, a prompt without a token, or a tokenizer without a token to pad with.
        """
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("A classifier reads texts, not messages.")
        encoded = self.tokenizer(list(prompts), padding=len(prompts) > 1, padding_side="right", return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if not bool(mask.any(-1).all()):
            raise ValueError("A prompt is empty: there is nothing to classify.")
        return ids.to(self.shadow.device), mask.to(self.shadow.device)
