"""Whether the weights of a stored adapter can take the place of another's, in place."""

from __future__ import annotations

from typing import Any

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.explicit import registered_config
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.backbone.truncated_config import selected_layers, truncated_config
from shadow_peft.checkpoint.reading import Checkpoint

_FIXED = (
    "variant", "normalize_injection", "use_shadow_state", "first_injected_layer", "alpha", "dropout", "num_shadow_layers",
    "shadow_num_attention_heads", "shadow_num_key_value_heads",
)  # fmt: skip
"""Fields of a config that a graph may have been compiled with, and that the shapes of tensors do not show."""

_NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Fields of a backbone's config that change nothing in what it computes."""


def check_swappable(adapter: ShadowAdapter, stored: Checkpoint) -> None:
    """Check all that loading does not check by the shapes of tensors.

    Raises:
        ValueError: the stored adapter computes something else with its weights.
    """
    fixed = {name: (getattr(stored.config, name), getattr(adapter.shadow_config, name)) for name in _FIXED}
    differing = [f"{name} {new!r} (here {old!r})" for name, (new, old) in fixed.items() if new != old]
    differing += _layer_differences(adapter, stored)
    if stored.provenance:  # files of the published packages do not tell the kind of shadow
        differing += _backbone_differences(adapter, stored.provenance.get("shadow_model_config"))
    if differing:
        raise ValueError(f"{stored.directory} cannot be swapped in: {', '.join(differing)}.")


def _layer_differences(adapter: ShadowAdapter, stored: Checkpoint) -> list[str]:
    """Base layers that the backbones correspond to, where an implicit one computes something else for other layers."""
    if not adapter.has_implicit_shadow:
        return []
    new, old = (selected_layers(adapter.decoder, config) for config in (stored.config, adapter.shadow_config))
    configs = [truncated_config(adapter.decoder, config).to_dict() for config in (stored.config, adapter.shadow_config)]
    reads_part = any(isinstance(m, SharedEmbedding) and m.columns is not None for m in adapter.shadow_model.modules())
    if new == old or (configs[0] == configs[1] and not reads_part):
        return []
    return [f"layers {new} of the base (here {old})"]


def _backbone_differences(adapter: ShadowAdapter, stored: dict[str, Any] | None) -> list[str]:
    if (stored is None) != adapter.has_implicit_shadow:
        return [
            "an implicit shadow (here an explicit one)" if stored is None else "an explicit shadow (here an implicit one)"
        ]
    if stored is None:
        return []
    new, old = registered_config(stored).to_dict(), adapter.shadow_model.config.to_dict()
    names = [name for name in sorted(new.keys() | old.keys()) if name not in _NOT_COMPUTED]
    return [f"the shadow's {n} {new.get(n)!r} (here {old.get(n)!r})" for n in names if new.get(n) != old.get(n)]
