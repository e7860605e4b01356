"""ShadowConfig: every choice that defines an adapter, validated, with a JSON round trip.

The mathematics of an adapter is part of its config (`variant`):

    "published"  the published method, as `shadow-peft` 0.1.x computes it: layer 0 runs untouched; injection before every
                 other layer, update after it, with LayerNorm and SiLU
    "peft"       as the Shadow tuner of `peft` computes it: every layer injected and updated, GELU and biases, no norm
    "readout"    ours: layer 0 runs untouched; the injected correction is taken back after the layer, what a layer adds is
                 corrected too, no update, and a read-out of the shadow's state behind the last layer
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from shadow_peft.storage.atomic import all_or_none, visible_files
from shadow_peft.storage.files import read_json, write_json
from shadow_peft.storage.hub import local_directory

CONFIG_FILE = "shadow_config.json"

logger = logging.getLogger(__name__)

Variant = Literal["published", "peft", "readout"]
ShadowInit = Literal["auto", "base", "random"]

_NOT_FIELDS = frozenset({"provenance"})
"""Keys of a stored config that belong to the file and not to the adapter."""


@dataclass(frozen=True)
class ShadowConfig:
    """The hyperparameters of one shadow adapter (METHOD: ShadowPEFT, arXiv 2604.19254).

    Args:
        num_shadow_layers: decoder layers of an implicit shadow backbone, at least 1.
        injection_hidden_size: rank r of the injection, at least 1; None means 16, or 64 in the variant "readout".
        gate_hidden_size: width k of the update's gate and transform, or of the read-out's gate, at least 2; None means 10,
            or 16 in the variant "readout".
        output_hidden_size: rank q of the output correction, at least 1; None means 32. Only in the variant "readout", like
            the next.
        readout_hidden_size: rank m of the read-out's linear map, at least 1; None means 32.
        normalize_injection: divide both states by their root mean square before the injection compares them; None means True
            in the variant "readout". The others have no such form. A stored config without it means False.
        use_shadow_state: whether the corrections of the variant "readout" see the shadow's state. With False they see zeros,
            and answers without drafts do not run the shadow, which still learns its own loss, drafts and can be detached.
        first_injected_layer: the base's layers before this one (counted from 0) run untouched, and no gradient goes through
            them; None means 1, or 0 in the variant "peft", which has no other form.
        alpha: factor of the injected correction; None means 0.1, or 1 in the variant "readout".
        dropout: probability in [0, 1) inside injection and update, active in training only; None means 0.2, or 0 in the
            variant "readout".
        shadow_hidden_size: width of an implicit backbone; None means the base's width. Another width adds a projection and
            an embedding table of its own, both trained.
        shadow_intermediate_size: MLP width of an implicit backbone; None means the base's.
        shadow_num_attention_heads: attention heads of an implicit backbone; None means the base's.
        shadow_num_key_value_heads: key/value heads of an implicit backbone; None means the base's.
        shadow_head_dim: width of one head of an implicit backbone; None means the base's.
        modules_to_save: heads that are trained and saved beside the adapter: `lm_head`, `shadow_lm_head` of a causal LM;
            `classifier_head`, `shadow_classifier_head` of a classifier (empty means both).
        shadow_init: how an implicit backbone is initialised: "random" weights, "base" copies of the base's own pretrained
            layers, "auto" copies where the sizes allow it and random weights elsewhere. None means "random", or "auto" in
            the variant "readout".
        shadow_init_layers: which base layers the implicit backbone corresponds to, and "base" copies: the "first" ones,
            "even"ly spaced ones, or their numbers, counted from 0 and ascending, such as "0,9,29".
        train_shadow_embeddings: train the embedding table that an explicit shadow brings along.
        train_base_adapters: train the PEFT adapters that the base carries together with the shadow.
        variant: the mathematics between the layers: "published", "peft" or "readout", see `docs/method.md`.

    Raises:
        ValueError: a value outside the ranges above.
        TypeError: a value of the wrong type.
    """

    num_shadow_layers: int = 1
    injection_hidden_size: int = None  # type: ignore[assignment]  # None: the variant's default, set below
    gate_hidden_size: int = None  # type: ignore[assignment]
    alpha: float = None  # type: ignore[assignment]
    dropout: float = None  # type: ignore[assignment]
    shadow_intermediate_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_num_key_value_heads: int | None = None
    shadow_head_dim: int | None = None
    modules_to_save: list[str] = field(default_factory=list)
    shadow_hidden_size: int | None = None
    shadow_init: ShadowInit = None  # type: ignore[assignment]
    shadow_init_layers: str = "first"
    train_shadow_embeddings: bool = False
    train_base_adapters: bool = False
    variant: Variant = "published"
    output_hidden_size: int = None  # type: ignore[assignment]  # stays None in the other variants
    readout_hidden_size: int = None  # type: ignore[assignment]
    normalize_injection: bool = None  # type: ignore[assignment]
    use_shadow_state: bool = True
    first_injected_layer: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _check_choice("variant", self.variant, get_args(Variant))
        for name, value in _DEFAULTS[self.variant].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, least in _LEAST.items():
            _check_int(name, getattr(self, name), least)
        for name in ("train_shadow_embeddings", "train_base_adapters", "normalize_injection", "use_shadow_state"):
            _check_switch(name, getattr(self, name))
        for name in ("alpha", "dropout"):
            _check_number(name, getattr(self, name))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.variant != "readout":
            _check_unset("normalize_injection", self.normalize_injection, False, self.variant)
            _check_unset("use_shadow_state", self.use_shadow_state, True, self.variant)
            _check_unset("output_hidden_size", self.output_hidden_size, None, self.variant)
            _check_unset("readout_hidden_size", self.readout_hidden_size, None, self.variant)
        if self.variant == "peft" and self.first_injected_layer != 0:
            raise ValueError(f"first_injected_layer must be 0 in the variant 'peft', got {self.first_injected_layer}.")
        _check_choice("shadow_init", self.shadow_init, get_args(ShadowInit))
        _check_layers(self.shadow_init_layers, self.num_shadow_layers)
        object.__setattr__(self, "modules_to_save", _check_names("modules_to_save", self.modules_to_save))

    @property
    def named_layers(self) -> list[int] | None:
        """The base layers that `shadow_init_layers` names by their numbers; None where it does not."""
        chosen = self.shadow_init_layers
        return None if chosen in _LAYER_CHOICES else [int(number) for number in chosen.split(",")]

    def injected_layers(self, num_layers: int) -> int:
        """How many of the decoder layers of a base are injected.

        Raises:
            ValueError: none would be.
        """
        if self.first_injected_layer >= num_layers:
            last = num_layers - 1
            raise ValueError(f"first_injected_layer is {self.first_injected_layer}, but the base's layers are 0 to {last}.")
        return num_layers - self.first_injected_layer

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShadowConfig:
        """The config of stored fields; unknown keys are logged and ignored."""
        if not isinstance(data, dict):
            raise TypeError(f"A shadow config is a JSON object, got {type(data).__name__}.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known - _NOT_FIELDS)
        if unknown:
            logger.warning("Ignoring unknown keys of a stored shadow config: %s", ", ".join(unknown))
        return cls(**{"normalize_injection": False, **{key: value for key, value in data.items() if key in known}})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `shadow_config.json` into a directory, which is created when it is missing."""
        with all_or_none(save_directory) as staging:
            write_json(self.to_dict(), staging / CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path) -> ShadowConfig:
        """The config in the `shadow_config.json` of a directory or hub repository.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        directory = local_directory(pretrained_path)
        return cls.from_dict(read_json(visible_files(directory).get(CONFIG_FILE, directory / CONFIG_FILE)))


_PUBLISHED = {
    "injection_hidden_size": 16,
    "gate_hidden_size": 10,
    "alpha": 0.1,
    "dropout": 0.2,
    "shadow_init": "random",
    "normalize_injection": False,
    "first_injected_layer": 1,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "published": _PUBLISHED,
    "peft": {**_PUBLISHED, "first_injected_layer": 0},
    "readout": {
        "injection_hidden_size": 64,
        "output_hidden_size": 32,
        "gate_hidden_size": 16,
        "readout_hidden_size": 32,
        "alpha": 1.0,
        "dropout": 0.0,
        "shadow_init": "auto",
        "normalize_injection": True,
        "first_injected_layer": 1,
    },
}
"""Variant -> what None means."""

_LEAST: dict[str, int | tuple[None, int]] = {
    "num_shadow_layers": 1,
    "injection_hidden_size": 1,
    "gate_hidden_size": 2,
    "output_hidden_size": (None, 1),
    "readout_hidden_size": (None, 1),
    "shadow_hidden_size": (None, 1),
    "shadow_intermediate_size": (None, 1),
    "shadow_num_attention_heads": (None, 1),
    "shadow_num_key_value_heads": (None, 1),
    "shadow_head_dim": (None, 1),
    "first_injected_layer": 0,
}
"""Least value of every integer field; a tuple allows None as well."""

_LAYER_CHOICES = ("first", "even")

_MOST = 2**20
"""More than any model has; a stored config that says more is broken, and memory is not asked for it."""


def _check_int(name: str, value: object, least: int | tuple[None, int]) -> None:
    optional = isinstance(least, tuple)
    bound = least[1] if isinstance(least, tuple) else least
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer{' or None' if optional else ''}, got {value!r}.")
    if not bound <= value <= _MOST:
        raise ValueError(f"{name} must be at least {bound} and at most {_MOST}, got {value}.")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number, got {value}.")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def _check_unset(name: str, value: object, unset: object, variant: str) -> None:
    if value != unset:
        raise ValueError(f"{name} is for the variant 'readout'; the formulas of {variant!r} have no such form.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_layers(value: object, count: int) -> None:
    if value in _LAYER_CHOICES:
        return
    if not isinstance(value, str) or not re.fullmatch(r"\d+(,\d+)*", value):
        raise ValueError(
            f"shadow_init_layers must be {', '.join(map(repr, _LAYER_CHOICES))} or numbers of layers such as '0,9,29', "
            f"got {value!r}."
        )
    numbers = [int(number) for number in value.split(",")]
    if numbers != sorted(set(numbers)) or len(numbers) != count:
        raise ValueError(
            f"shadow_init_layers must name num_shadow_layers ({count}) different layers in ascending order, got {value!r}."
        )


def _check_names(name: str, value: object) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of module names, got {value!r}.")
    return list(value)
