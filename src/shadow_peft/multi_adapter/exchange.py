"""Exchanging the parts of two adapters on one base: how a model becomes another one of its adapters.

A `ShadowPeftModel` is its active adapter: the modules are its own, under the names that a model with one adapter has. The
others are `ShadowAdapter`s beside it. Activating one of them exchanges the parts, so that nothing else of the library needs
to know that there are several.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shadow_peft.adapter import PARTS, ShadowAdapter

_STATE = (
    "shadow_config",
    "has_implicit_shadow",
    "shared_table_name",
    "recompute_backbone",
    "label_tokens",
    "_backbone_signature",
    "_embedding_map",
    "_embedding_map_of",
    "_paused",
)
"""Attributes that belong to an adapter and are no modules."""


def exchange(one: ShadowAdapter, other: ShadowAdapter) -> None:
    """Exchange everything that two adapters on one base consist of."""
    for name in (*PARTS, "task_heads", *_STATE):
        first, second = getattr(one, name), getattr(other, name)
        setattr(one, name, second)
        setattr(other, name, first)


def see_base(adapter: ShadowAdapter) -> ShadowAdapter:
    """The adapter, which sees its base from now on without holding it as a module: the model does that."""
    base = adapter._modules.pop("base_model")
    adapter.__dict__["base_model"] = base
    return adapter


def pause_training(adapter: ShadowAdapter) -> None:
    """Freeze an adapter and remember which of its parameters were trained; one that is paused already stays so."""
    if adapter._paused is None:
        adapter._paused = frozenset(name for name, p in _own_parameters(adapter) if p.requires_grad)
        for _, parameter in _own_parameters(adapter):
            parameter.requires_grad_(False)


def resume_training(adapter: ShadowAdapter) -> None:
    """Train again what `pause_training` found trained."""
    if adapter._paused is not None:
        for name, parameter in _own_parameters(adapter):
            parameter.requires_grad_(name in adapter._paused)
        adapter._paused = None


def _own_parameters(adapter: ShadowAdapter) -> Iterator[tuple[str, nn.Parameter]]:
    for part_name, part in {**adapter.parts(), "task_heads": adapter.task_heads}.items():
        yield from part.named_parameters(prefix=part_name)
