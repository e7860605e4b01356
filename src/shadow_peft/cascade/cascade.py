"""`ShadowCascade`: the shadow answers, and the attached or a remote model where it is unsure."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.cascade.answers import Answer, Policy
from shadow_peft.cascade.calibration import Calibration, Promise, PromiseKind, calibrate
from shadow_peft.cascade.classes import Classifiers
from shadow_peft.cascade.outcomes import Outcome, Quality, exact_match
from shadow_peft.cascade.remote import Prompt, RemoteModel
from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.signals import Takeover
from shadow_peft.cascade.storage import find_calibration, save_calibration
from shadow_peft.cascade.writing import Writers
from shadow_peft.outputs import InferenceMode
from shadow_peft.storage.versions import versions_of
from shadow_peft.tasks.base import ShadowTaskModel
from shadow_peft.tasks.causal_lm import ShadowForCausalLM

NEW_TOKENS = 128
"""Longest answer where nothing else is said, in tokens."""

_PROBED = 8
"""Tokens that the fingerprint of a shadow reads, and logits that it has at most."""

_TOLERANCE = 0.25
"""Nats by which another dtype may change a fingerprint."""


class ShadowCascade:
    """The shadow answers; where its confidence is below a threshold, the attached model takes over, or a remote one.

    Per answer, the attached model answers anew; per token, it goes on where the shadow gets unsure. Either way it uses the
    states and the cache of the tokens that the shadow has read.

    Args:
        model: a `ShadowForCausalLM` or `ShadowForSequenceClassification` in eval mode, which is both shadow and attached
            model; or an exported shadow, which needs `remote`.
        tokenizer: of both.
        remote: who takes over instead of the attached model.
        calibration: confidence, threshold and takeover; see `calibrate`.
        threshold: another threshold than that of the calibration; its promise is void then.
        takeover: "answer" or "token"; None follows the calibration, or is "answer".
        generation_config: how to decode; None is the model's own.
        **generation: settings of it, such as `max_new_tokens` (128 if nobody says) or `do_sample`.

    Raises:
        TypeError: no such model.
        ValueError: the model is in training mode, an exported shadow has nobody to ask, beams, or a calibration of another
            shadow, or of another takeover without a threshold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        remote: RemoteModel | None = None,
        calibration: Calibration | None = None,
        threshold: float | None = None,
        takeover: Takeover | None = None,
        generation_config: GenerationConfig | None = None,
        **generation: Any,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"Expected a task model or an exported shadow, got {type(model).__name__}.")
        if model.training:
            raise ValueError("The model is in training mode, so dropout would change its answers; call model.eval() first.")
        if remote is None and not isinstance(model, ShadowTaskModel):
            raise ValueError(f"{type(model).__name__} has no base to ask: pass remote=RemoteModel(...), or the task model.")
        self.shadow = _in_mode(model, "shadow_only")
        self.remote = remote
        self.tokenizer = tokenizer
        self._threshold, self._takeover = threshold, takeover
        attached: Any = _in_mode(model, "base_shadow") if remote is None else remote
        self._sides: Writers | Classifiers
        if model.can_generate():
            config = _config_of(model, tokenizer, generation_config, generation)
            self._sides = Writers(self.shadow, attached, tokenizer, config)
        else:
            if generation or generation_config is not None:
                raise ValueError(f"{type(model).__name__} writes no text, so it takes no settings of generation.")
            self._sides = Classifiers(self.shadow, attached, tokenizer)
        self.calibration: Calibration | None = None
        if calibration is not None:
            self._use(calibration)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, remote: RemoteModel, **kwargs: Any) -> ShadowCascade:
        """Load an exported shadow with its tokenizer, and the calibration beside it, if there is one.

        Args:
            path: the folder of the exported shadow.
            remote: who takes over.
            **kwargs: further arguments of `ShadowCascade`.

        Raises:
            OSError: there is no model or no tokenizer.
            ValueError: the calibration is malformed, or of another shadow.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        names = AutoConfig.from_pretrained(path).architectures or []
        classifies = any(name.endswith("ForSequenceClassification") for name in names)
        auto: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        model, tokenizer = auto.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        if kwargs.get("calibration") is None:
            kwargs["calibration"] = find_calibration(path)
        return cls(model, tokenizer, remote=remote, **kwargs)

    # ---------------------------------------------------------------- answering

    @property
    def policy(self) -> Policy:
        """When the attached model takes over.

        Raises:
            ValueError: nobody has given a threshold.
        """
        calibration = self.calibration
        threshold = self._threshold if calibration is None or self._threshold is not None else calibration.threshold
        if threshold is None:
            raise ValueError("The cascade has no threshold: call calibrate(), load a calibration, or pass threshold=...")
        scorer = Scorer() if calibration is None else calibration.scorer
        return Policy(scorer, threshold, self.takeover)

    @property
    def takeover(self) -> Takeover:
        """Whether the attached model takes over per answer or per token."""
        own = "answer" if self.calibration is None else self.calibration.takeover
        return self._takeover or own

    def answer(self, prompt: Prompt) -> Answer:
        """Answer one prompt: a text, or the messages of a conversation."""
        return self.answers([prompt])[0]

    def answers(self, prompts: Sequence[Prompt], batch_size: int = 16) -> list[Answer]:
        """Answer prompts, one after the other where the attached model takes over per token, else in batches.

        Raises:
            ValueError: there is no threshold, or a prompt is empty.
        """
        policy = self.policy
        batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        return [answer for batch in batches for answer in self._sides.answers(batch, policy)]

    # ---------------------------------------------------------------- calibrating

    def measure(
        self,
        dataset: Iterable[dict[str, Any]],
        *,
        quality: Quality = exact_match,
        takeover: Takeover | None = None,
        batch_size: int = 16,
    ) -> list[Outcome]:
        """Let both models answer, and see what their answers are worth; `calibrate` takes the result as often as needed.

        Args:
            dataset: rows with "prompt" and "completion", as texts or as messages; of a classifier, the completion is the
                name of the class.
            quality: an answer and its reference -> a number in [0, 1].
            takeover: per token, the attached model goes on from every place where some threshold would let it.
            batch_size: prompts that are answered together.

        Raises:
            ValueError: a row without prompt or completion.
            RemoteError: the remote model failed.
        """
        pairs = [_pair(row, number) for number, row in enumerate(dataset, start=1)]
        found: list[Outcome] = []
        for start in range(0, len(pairs), batch_size):
            prompts, references = zip(*pairs[start : start + batch_size], strict=True)
            found += self._sides.outcomes(prompts, references, quality, takeover or self.takeover)
        return found

    def calibrate(
        self,
        dataset: Iterable[dict[str, Any]] | Sequence[Outcome],
        target: float,
        *,
        promise: PromiseKind = "quality",
        confidence: float | None = 0.95,
        quality: Quality = exact_match,
        takeover: Takeover | None = None,
        signals: Sequence[str] | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Calibration:
        """Find the threshold that keeps a promise, and use it from now on.

        Args:
            dataset: rows as `measure` takes them, which neither model was trained on; or what `measure` returned.
            target: the least quality, the most regret, or the largest share of answers to ask for.
            promise: "quality", "regret" or "escalations", see `cascade.calibration`.
            confidence: how surely the promise is kept; None keeps it in expectation (not for a quality).
            quality: an answer and its reference -> a number in [0, 1].
            takeover: None keeps that of the cascade.
            signals: to choose from; None takes all.
            seed: of the division of the data.
            batch_size: prompts that are answered together.

        Returns:
            The calibration, with its report.

        Raises:
            ValueError: the data cannot carry the promise; the message says what can be.
                The cascade stays as it was.
        """
        wanted, takeover = Promise(promise, target, confidence), takeover or self.takeover
        rows: list[Any] = list(dataset)
        outcomes = [row for row in rows if isinstance(row, Outcome)]
        if len(outcomes) != len(rows):
            outcomes = self.measure(rows, quality=quality, takeover=takeover, batch_size=batch_size)
        found = calibrate(outcomes, wanted, takeover=takeover, signals=signals, seed=seed)
        found = replace(found, provenance=self._provenance(quality))
        self.calibration, self._threshold, self._takeover = found, None, None
        return found

    def save_calibration(self, directory: str | Path) -> Path:
        """Write the calibration as `cascade.json`, beside the exported shadow or the adapter.

        Raises:
            ValueError: there is none.
        """
        if self.calibration is None:
            raise ValueError("There is no calibration to save: call calibrate() first.")
        return save_calibration(self.calibration, directory)

    def _use(self, calibration: Calibration) -> None:
        """Take a calibration over if it belongs to this shadow and to this kind of takeover."""
        require_same_shadow(calibration, self.shadow)
        if self._threshold is None and self._takeover not in (None, calibration.takeover):
            raise ValueError(
                f"The calibration is for a takeover per {calibration.takeover}, and takeover={self._takeover!r} was given: "
                "its threshold means nothing there. Calibrate again, or pass a threshold."
            )
        self.calibration = calibration

    def _provenance(self, quality: Quality) -> dict[str, Any]:
        """Where a calibration comes from."""
        packages = ("shadow-peft", "torch", "transformers", "scikit-learn")
        sides = self._sides
        generation = sides.config.to_diff_dict() if isinstance(sides, Writers) else None
        return {
            "versions": {**versions_of(packages), "python": platform.python_version()},
            "shadow": type(self.shadow).__name__,
            "base": self.shadow.name_or_path or None,
            "attached": None if self.remote is None else {"model": self.remote.model, "base_url": self.remote.base_url},
            "quality": getattr(quality, "__name__", type(quality).__name__),
            "generation": generation,
            "fingerprint": fingerprint(self.shadow),
        }


@torch.no_grad()
def fingerprint(shadow: PreTrainedModel) -> list[float]:
    """Logits of a shadow on fixed tokens, by which another one is told apart: its log-probabilities of a few outputs."""
    config = shadow.config.get_text_config()
    tokens = [token for token in range(config.vocab_size) if token != config.pad_token_id][:_PROBED]
    ids = torch.tensor([tokens], device=shadow.device)
    logits = shadow(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    last = logits[:, -1] if logits.dim() == 3 else logits
    probed: list[float] = last[0].float().log_softmax(-1)[:_PROBED].tolist()
    return [round(value, 4) for value in probed]


def require_same_shadow(calibration: Calibration, shadow: PreTrainedModel) -> None:
    """Refuse a calibration of another shadow; one without a fingerprint passes.

    Raises:
        ValueError: on the same tokens, this shadow computes other logits.
    """
    stored = calibration.provenance.get("fingerprint")
    if stored is not None and not _is_close(stored, fingerprint(shadow)):
        raise ValueError(
            "This calibration was made for another shadow: on the same tokens it computes other logits. Calibrate again."
        )


def _is_close(stored: Any, own: list[float]) -> bool:
    return len(stored) == len(own) and all(abs(a - b) <= _TOLERANCE for a, b in zip(stored, own, strict=True))


def _in_mode(model: PreTrainedModel, mode: InferenceMode) -> PreTrainedModel:
    """A task model of the same parts in a mode of its own, so that answering changes no mode of the caller's model."""
    if not isinstance(model, ShadowTaskModel):
        return model
    view = type(model)(model.peft_model, inference_mode=mode)
    if isinstance(model, ShadowForCausalLM):
        view.generation_config = model.generation_config
    return view


def _config_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: GenerationConfig | None, settings: dict[str, Any]
) -> GenerationConfig:
    """The generation config with a longest answer and a token to pad with.

    Raises:
        ValueError: unknown settings, or beams.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config if given is None else given)
    unused = config.update(**settings)
    if unused:
        raise ValueError(f"There are no settings of generation called {', '.join(sorted(unused))}.")
    if config.max_new_tokens is None:
        config.max_new_tokens = NEW_TOKENS
    if config.pad_token_id is None:
        config.pad_token_id = next(filter(None.__ne__, (tokenizer.pad_token_id, tokenizer.eos_token_id)), 0)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise ValueError("A cascade writes one answer token by token: num_beams and num_return_sequences must be 1.")
    return config


def _pair(row: dict[str, Any], number: int) -> tuple[Prompt, str]:
    """The prompt and the reference of a row."""
    if not isinstance(row, dict) or "prompt" not in row or "completion" not in row:
        raise ValueError(f"Row {number} has no 'prompt' and 'completion'.")
    completion = row["completion"]
    return row["prompt"], completion if isinstance(completion, str) else completion[-1]["content"]
