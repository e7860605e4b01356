"""A bounded number of stored adapters in memory: those that were used least recently make room for others."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from shadow_peft.multi_adapter.mixed import BASE


class LoadsAdapters(Protocol):
    """What a pool asks of a model; task models and `ShadowPeftModel` have it."""

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""

    def load_adapter(self, pretrained_shadow_path: str | Path, adapter_name: str, **settings: Any) -> None:
        """Load a stored adapter beside the others."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""


class AdapterPool:
    """Stored adapters that a model has in memory while they are in use, and afterwards as long as there is room::

        with pool.use(["robot", "__base__", "poems"]) as names:
            model.generate(**batch, adapter_names=names)

    The model's active adapter belongs to no pool: it is always there. Threads may use one pool.

    Args:
        model: a task model or a `ShadowPeftModel`.
        paths: name -> directory or hub repository of every adapter that may be asked for.
        capacity: the most adapters of the pool in memory, at least 1.
        **settings: further arguments of `load_adapter`.

    Raises:
        ValueError: a capacity below 1, or a path for the active adapter's name.
    """

    def __init__(self, model: LoadsAdapters, paths: Mapping[str, str | Path], capacity: int, **settings: Any) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}.")
        if model.active_adapter in paths:
            raise ValueError(
                f"{model.active_adapter!r} is the active adapter and stays in memory; leave it out of the pool."
            )
        self._model, self._paths, self._capacity, self._settings = model, dict(paths), capacity, settings
        self._loaded: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._in_use: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, the least recently used first."""
        return list(self._loaded)

    @contextmanager
    def use(self, adapter_names: Sequence[str]) -> Iterator[list[str]]:
        """Inside the context, all adapters of a batch are in memory; the context is the names.

        Raises:
            ValueError: an unknown name, an adapter that cannot be loaded, or more adapters in use at once than the pool
                holds.
        """
        wanted = [name for name in dict.fromkeys(adapter_names) if name not in (BASE, self._model.active_adapter)]
        with self._lock:
            self._load(wanted)
            self._in_use.update(wanted)
        try:
            yield list(adapter_names)
        finally:
            with self._lock:
                self._in_use.subtract(wanted)

    def _load(self, wanted: Sequence[str]) -> None:
        unknown = [name for name in wanted if name not in self._paths]
        if unknown:
            raise ValueError(f"The pool has no adapter {unknown[0]!r}; it has {len(self._paths)} others.")
        needed = set(wanted) | {name for name in self._loaded if self._in_use[name]}
        if len(needed) > self._capacity:
            raise ValueError(f"{len(needed)} adapters are in use at once, and the pool holds {self._capacity}.")
        for name in wanted:
            if name not in self._loaded:
                self._make_room(needed)
                self._model.load_adapter(self._paths[name], name, **self._settings)
            self._loaded[name] = None
            self._loaded.move_to_end(name)

    def _make_room(self, needed: set[str]) -> None:
        """Remove the least recently used adapter that nobody needs, where the pool is full."""
        if len(self._loaded) == self._capacity:
            name = next(name for name in self._loaded if name not in needed)
            self._model.delete_adapter(name)
            del self._loaded[name]
