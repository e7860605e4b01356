"""What a model's forward takes and returns, whatever it calls it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems")
"""Names under which models take and return their cache."""

_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that describe packed sequences; attention reads them from a forward's keyword arguments."""


@dataclass(frozen=True)
class Signature:
    """What a model's forward takes: declared names, and whether it takes others too."""

    names: frozenset[str]
    open: bool

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """The signature of a module's forward."""
        parameters = inspect.signature(type(model).forward).parameters.values()
        names = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        return cls(names, any(p.kind is p.VAR_KEYWORD for p in parameters))

    @property
    def cache_name(self) -> str | None:
        """The argument that carries a transformers cache, or None."""
        return next((name for name in CACHE_NAMES if name in self.names), None)

    @property
    def is_recurrent(self) -> bool:
        """Whether the model keeps a state instead of tokens: its mask then covers the new tokens alone."""
        return self.cache_name == "cache_params"

    def accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that have a value and that the forward declares, or reads from its keyword arguments."""
        return {
            name: value
            for name, value in arguments.items()
            if value is not None and (name in self.names or (self.open and name in _PACKING))
        }


def returned_cache(outputs: Any) -> Any:
    """The cache in a model's outputs, under any of its names; None if there is none."""
    return next((outputs[name] for name in CACHE_NAMES if name in outputs), None)


def replace_cache(outputs: Any, cache: Any) -> None:
    """Put another cache where a model returned its own."""
    for name in CACHE_NAMES:
        if name in outputs:
            outputs[name] = cache
            return
