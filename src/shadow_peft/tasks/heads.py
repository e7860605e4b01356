"""The functions from hidden states to logits of a causal language model's adapters."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base.task_head import TaskHead
from shadow_peft.model import ShadowPeftModel


class AdapterHeads(NamedTuple):
    """The heads of one adapter.

    Attributes:
        base: the adapted base's logits of its final hidden state.
        shadow: the shadow's logits of its state.
        replaces_base: whether `base` is a trained copy, which the base itself does not compute.
        trained: the modules that they were built with.
    """

    base: TaskHead
    shadow: TaskHead
    replaces_base: bool
    trained: dict[str, nn.Module]


class LanguageHeads:
    """The heads of every adapter, built when they are first asked for; those without a trained head share one.

    Args:
        model: the adapted base with its adapters.
    """

    def __init__(self, model: ShadowPeftModel) -> None:
        self._model, self._base = model, model.base_model
        self._path, self._width = model.decoder.head_input_path, model.decoder.hidden_size
        self._output = model.base_model.get_output_embeddings()
        self._own = self._build(None)
        self._built: list[AdapterHeads] = []

    @property
    def are_outdated(self) -> bool:
        """Whether the base's output embedding was replaced since, for example by resizing the vocabulary."""
        return self._base.get_output_embeddings() is not self._output

    @property
    def own(self) -> TaskHead:
        """The base's own head."""
        return self._own

    def of(self, adapter: ShadowAdapter) -> AdapterHeads:
        """The heads of an adapter."""
        trained = dict(adapter.task_heads.items())
        if not trained:
            return AdapterHeads(self._own, self._own, False, trained)
        found = next((heads for heads in self._built if heads.trained == trained), None)
        if found is None:
            base, shadow = (
                self._build(trained[name]) if name in trained else self._own for name in ("lm_head", "shadow_lm_head")
            )
            found = AdapterHeads(base, shadow, "lm_head" in trained, trained)
            present = [dict(self._model.adapter(name).task_heads.items()) for name in self._model.adapter_configs]
            self._built = [heads for heads in self._built if heads.trained in present] + [found]
        return found

    def _build(self, trained: nn.Module | None) -> TaskHead:
        """A head with a trained output embedding, or the base's own."""
        return TaskHead(self._base, self._path, trained, width=self._width)
