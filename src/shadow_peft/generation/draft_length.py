"""How many tokens a draft gets: another one while it is expected to win more tokens per cost than the pass so far.

A pass of the base and n drafted tokens cost 1 + n c, in base passes, and are expected to win 1 + a_1 + .. + a_n tokens, a_i
being the chance that the base accepts all of the first i. So a shadow that is seldom accepted costs little, and one that
never is costs nothing. With the schedule "constant", drafts end only at `num_assistant_tokens` or below
`assistant_confidence_threshold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base.task_head import input_embeddings


@dataclass
class AcceptanceEstimate:
    """How far the shadow's confidence can be trusted, from what the base accepted of recent drafts.

    Attributes:
        confident: decaying sum of the confidences of the tokens that were verified.
        accepted: decaying number of them that were accepted; both start as if two tokens had been verified, right by 9/10.
    """

    confident: float = 2.0
    accepted: float = 1.8

    @property
    def trust(self) -> float:
        """How many times as likely as the shadow is sure the base accepts its token."""
        return self.accepted / self.confident

    def update(self, confidences: list[float], accepted: int) -> None:
        """Count one pass; tokens behind the first rejected one were not verified. Without a draft, trust slowly returns."""
        if not confidences:
            self.accepted += (self.confident - self.accepted) / 400
            return
        self.confident = 0.9 * self.confident + sum(confidences[: accepted + 1])
        self.accepted = 0.9 * self.accepted + accepted


class DraftLength:
    """Whether the draft of one pass is worth another token, for one row or the mean of several.

    Another token is worth it while a / c exceeds the ratio of tokens won to cost so far, which is largest then.

    Args:
        cost: c, see `drafting_cost`; 0 for drafts that do not adapt.
        estimate: how far to trust the shadow.
    """

    def __init__(self, cost: float, estimate: AcceptanceEstimate) -> None:
        self._cost, self._trust = cost, estimate.trust
        self._chances: Tensor | float = 1.0
        self._won = self._spent = 1.0

    @property
    def may_begin(self) -> bool:
        """False if no confidence whatever would make a first token worth its cost."""
        return self._trust >= self._cost

    def grows(self, confidence: Tensor) -> bool:
        """Whether the token that is about to be drafted is worth it, by the shadow's confidence `[B]` in it."""
        self._chances = self._chances * (confidence * self._trust).clamp(max=1.0)
        chance = float(self._chances.mean())
        worth = chance * self._spent >= self._cost * self._won
        self._won, self._spent = self._won + chance, self._spent + self._cost
        return worth


class DeviceCosts(NamedTuple):
    """What a forward pass takes on a device, in the time of reading one weight.

    Attributes:
        saturation: tokens whose arithmetic takes as long as reading the weights.
        layer: what it takes to dispatch the operations of a decoder layer.
    """

    saturation: float
    layer: float

    def of_pass(self, weights: int, layers: int, tokens: int) -> float:
        """A pass of a model over so many tokens."""
        return weights * (1 + tokens / self.saturation) + layers * self.layer


DEVICE_COSTS = {"cpu": DeviceCosts(saturation=5, layer=6e5)}
"""A CPU core as measured on a base of 3 M and one of 46 M parameters, see LOG.md."""

ACCELERATOR_COSTS = DeviceCosts(saturation=256, layer=3e8)
"""Estimates: a layer's forty kernels take some 0.3 ms to launch, in which 2 TB/s read 3e8 weights of two bytes."""


def drafting_cost(adapter: ShadowAdapter, rows: int = 1) -> float:
    """Cost of drafting a token for every row and verifying it, as a share of a base pass over one token per row.

    Drafting is a pass of backbone and head; verifying adds tokens to a pass that is made anyway.
    """
    return mixed_drafting_cost([(adapter, rows)], rows)


def mixed_drafting_cost(adapters: Sequence[tuple[ShadowAdapter, int]], rows: int) -> float:
    """The same where each backbone drafts for some rows; each is read once for its own.

    Args:
        adapters: each adapter, and the number of its rows.
        rows: number of all rows, those without a shadow included.
    """
    base_model, decoder = adapters[0][0].base_model, adapters[0][0].decoder
    device = DEVICE_COSTS.get(base_model.device.type, ACCELERATOR_COSTS)
    head = _num_weights(base_model.get_output_embeddings())
    drafting = device.of_pass(head, 0, rows)
    for backbone, own_rows in [(adapter.shadow_model, number) for adapter, number in adapters]:
        weights = _num_weights(backbone) - _num_weights(input_embeddings(backbone))
        drafting += device.of_pass(weights, getattr(backbone.config, "num_hidden_layers", 1), own_rows)
    base_weights = _num_weights(decoder.backbone) - _num_weights(input_embeddings(decoder.backbone)) + head
    verifying = base_weights * rows / device.saturation
    return (drafting + verifying) / device.of_pass(base_weights, len(decoder.layers), rows)


def _num_weights(module: nn.Module | None) -> int:
    """Number of parameters of a module, if there is one."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())
