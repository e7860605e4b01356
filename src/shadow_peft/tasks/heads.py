"""The heads of a task model's adapters, and the logits of batches whose rows have different heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base.task_head import TaskHead
from shadow_peft.model import ShadowPeftModel
from shadow_peft.multi_adapter.mixed import BASE
from shadow_peft.multi_adapter.rows import Key, merge_rows, rows_by, select_rows

Head = TypeVar("Head", bound=Callable[[Tensor], Tensor])


class Pair(NamedTuple, Generic[Head]):
    """The heads of some rows: of the adapted base, and of the shadow, None for rows of the bare base."""

    base: Head
    shadow: Head | None


@dataclass(frozen=True)
class RowHeads(Generic[Head]):
    """The heads of a batch.

    Attributes:
        by_row: the heads of each row; one entry stands for all rows.
    """

    by_row: tuple[Pair[Head], ...]

    @property
    def groups(self) -> list[tuple[list[int] | None, Pair[Head]]]:
        """Rows and their heads; None for all rows."""
        return self._grouped(self.by_row)

    @property
    def shadow_rows(self) -> list[int] | None:
        """The rows that have a shadow; None for all rows."""
        rows = [row for row, pair in enumerate(self.by_row) if pair.shadow is not None]
        return None if len(rows) == len(self.by_row) else rows

    def base_logits(self, states: Tensor) -> Tensor:
        """Logits `[B, ..., V]` of the base's states `[B, ..., d]`."""
        parts = [(rows, head(select_rows(states, rows))) for rows, head in self._grouped([p.base for p in self.by_row])]
        return _merged(parts)

    def shadow_logits(self, states: Tensor) -> Tensor:
        """Logits `[B, ..., V]` of the shadows' states `[B, ..., d]`; zero in rows without a shadow."""
        heads = [pair.shadow for pair in self.by_row]
        parts = [(rows, head(select_rows(states, rows))) for rows, head in self._grouped(heads) if head is not None]
        without = [row for row, head in enumerate(heads) if head is None]
        if without:
            width = parts[0][1] if parts else self.by_row[0].base(states[:1])
            parts.append((without, width.new_zeros(len(without), *width.shape[1:])))
        return _merged(parts)

    def _grouped(self, keys: Sequence[Key]) -> list[tuple[list[int] | None, Key]]:
        groups = rows_by(keys)
        if len(groups) == 1:
            return [(None, keys[0])]
        return [(rows, key) for key, rows in groups.items()]


def _merged(parts: Sequence[tuple[list[int] | None, Tensor]]) -> Tensor:
    rows, first = parts[0]
    return first if rows is None else merge_rows([(rows, part) for rows, part in parts if rows is not None])


class AdapterHeads(NamedTuple):
    """The heads of one adapter.

    Attributes:
        base: the adapted base's logits of its final hidden state.
        shadow: the shadow's logits of its state.
        trained: the modules that they were built with.
    """

    base: TaskHead
    shadow: TaskHead
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

    def rows(self, names: tuple[str, ...] | None) -> RowHeads[TaskHead]:
        """The heads of a batch with these adapters, or with the active one."""
        if names is None:
            heads = self.of(self._model)
            return RowHeads((Pair(heads.base, heads.shadow),))
        pairs = {BASE: Pair[TaskHead](self._own, None)}
        for name in set(names) - {BASE}:
            heads = self.of(self._model.adapter(name))
            pairs[name] = Pair(heads.base, heads.shadow)
        return RowHeads(tuple(pairs[name] for name in names))

    def replaces_base(self, names: tuple[str, ...] | None) -> bool:
        """Whether some of these adapters have a trained copy of the base's head."""
        adapters = [self._model] if names is None else [self._model.adapter(name) for name in set(names) - {BASE}]
        return any("lm_head" in adapter.task_heads for adapter in adapters)

    def of(self, adapter: ShadowAdapter) -> AdapterHeads:
        """The heads of an adapter."""
        trained = dict(adapter.task_heads.items())
        if not trained:
            return AdapterHeads(self._own, self._own, trained)
        found = next((heads for heads in self._built if heads.trained == trained), None)
        if found is None:
            base, shadow = (
                self._build(trained[name]) if name in trained else self._own for name in ("lm_head", "shadow_lm_head")
            )
            found = AdapterHeads(base, shadow, trained)
            present = [dict(self._model.adapter(name).task_heads.items()) for name in self._model.adapter_configs]
            self._built = [heads for heads in self._built if heads.trained in present] + [found]
        return found

    def _build(self, trained: nn.Module | None) -> TaskHead:
        """A head with a trained output embedding, or the base's own."""
        return TaskHead(self._base, self._path, trained, width=self._width)
