"""What passes take, measured in the running generation.

    T(n) = a + b n     a base pass over one token and n drafted ones a row, with all that belongs to it: least squares over
                       medians for n = 0, 1, 2 to 3, 4 to 7 and so on, and over b = q a, q being what is believed before
    d                  drafting a token: the median of what was measured, and what is believed before

Times are read where the values of a pass have been read, so nothing waits for a device that would not have waited otherwise.
What is believed before anything is measured is a formula of weights, arithmetic and dispatch. Measurements are kept beside
a model and not in it, as long as it lives: times for every device, dtype, number of rows and size of what drafts, and what
became of the drafts also for every set of adapters. Of each the latest are kept.

With several processes the prior alone counts: all of them must draft the same number of tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.generation.acceptance import Experience

T = TypeVar("T")

clock: Callable[[], float] = time.perf_counter
"""Seconds since some moment; tests have a clock of their own."""

KEPT = 9
"""Measurements of a kind that are kept, the latest ones."""
KEPT_BATCHES = 64
"""Kinds of batches of which measurements are kept, those that were asked for last."""
PRIOR_WEIGHT = 2.0
"""Measurements that what is believed before weighs as much as."""


class Costs(NamedTuple):
    """What drafting costs, in base passes over one token a row.

    Attributes:
        draft: a pass of backbone and head for the next token, with all that is done to its logits.
        verify: one token more in a base pass.
    """

    draft: float
    verify: float


class Measured:
    """Seconds of the latest passes, by the bit length of the draft, and of drafting a token."""

    def __init__(self) -> None:
        self.passes: dict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.drafts: deque[float] = deque(maxlen=KEPT)


class PassTimes:
    """What passes of one model over a number of rows take.

    Args:
        prior: what is taken to be so before anything is measured.
        measures: False leaves it at that.
        measured: what was measured before, by batches of the same shape; None begins.

    Attributes:
        experience: what became of the drafts of earlier generations; None before the first.
    """

    experience: Experience | None = None

    def __init__(self, prior: Costs, measures: bool = True, measured: Measured | None = None) -> None:
        self._prior, self._measures = prior, measures
        measured = Measured() if measured is None else measured
        self._passes, self._drafts = measured.passes, measured.drafts

    @property
    def knows_base(self) -> bool:
        """Whether passes without drafts, to which all is compared, were measured as far as they shall be."""
        return not self._measures or len(self._passes[0]) > 1

    def add_pass(self, drafted: int, seconds: float) -> None:
        """A base pass over a draft of so many tokens, with all that belongs to it, has taken so long."""
        if self._measures:
            self._passes[drafted.bit_length()].append((drafted, seconds))

    def add_draft(self, tokens: int, seconds: float) -> None:
        """Drafting so many tokens has taken so long."""
        if self._measures:
            self._drafts.append(seconds / tokens)

    def costs(self) -> Costs:
        """What is known by now."""
        first, more = self._line()
        if first <= 0:
            return self._prior
        weight = _weight(self._drafts)
        measured = weight * _lower_median(self._drafts) if weight else 0.0
        draft = (measured + PRIOR_WEIGHT * self._prior.draft * first) / (weight + PRIOR_WEIGHT)
        return Costs(draft / first, max(0.0, more / first))

    def _line(self) -> tuple[float, float]:
        """a and b in seconds, which make the sum of w_n (a + b n - t_n)^2 and 2 (b - q a)^2 smallest; a = 0 if unknown."""
        q = self._prior.verify
        rows = [(PRIOR_WEIGHT, -q, 1.0, 0.0)]  # of weight w, factors of a and of b, and t
        for measured in list(self._passes.values()):
            if len(measured) > 1:
                drafted, seconds = _lower_median(measured, key=lambda pair: pair[1] / (1 + q * pair[0]))
                rows.append((_weight(measured), 1.0, drafted, seconds))
        if len(rows) == 1:
            return 0.0, 0.0
        aa, ab, bb = (sum(w * x[i] * x[j] for w, *x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
        at, bt = (sum(w * x[i] * x[2] for w, *x in rows) for i in (0, 1))
        determinant = aa * bb - ab * ab
        return (at * bb - bt * ab) / determinant, (bt * aa - at * ab) / determinant


def _weight(measured: deque[Any]) -> int:
    """One measurement says nothing, it may have paid for setting something up."""
    return max(0, len(measured) - 1)


def _lower_median(measured: deque[Any], key: Callable[[Any], float] | None = None) -> Any:
    """The median, of two the smaller one."""
    return sorted(measured, key=key)[(len(measured) - 1) // 2]


Shares = dict[str, tuple[ShadowAdapter, int]]
"""Name -> an adapter, and the number of rows that it drafts."""

_Key = tuple[Any, ...]


class _Known(NamedTuple):
    """What is known of a model: by the shape of a batch, and by its adapters too."""

    measured: dict[_Key, Measured]
    times: dict[_Key, PassTimes]


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def pass_times(adapter: ShadowAdapter, rows: int, shares: Shares | None = None, head_share: float = 1.0) -> PassTimes:
    """What is known of an adapted model's passes over so many rows, on its device and in its dtype.

    Args:
        adapter: the adapted model.
        rows: the number of all rows.
        shares: the adapters that draft; None is the model itself for all rows.
        head_share: how much of the head drafting reads.
    """
    known = _KNOWN.setdefault(adapter, _Known({}, {}))
    drafters = {"": (adapter, rows)} if shares is None else shares
    weights = sum(_num_weights(drafter.shadow_model) for drafter, _ in drafters.values())
    drafted = sum(own for _, own in drafters.values())
    base = adapter.base_model
    shape = base.device, base.dtype, rows, head_share < 1, len(drafters), drafted, weights
    names = tuple(sorted((name, own) for name, (_, own) in drafters.items()))

    def times() -> PassTimes:
        measured = _latest(known.measured, shape, Measured)
        return PassTimes(prior_costs(adapter, rows, shares, head_share), _is_alone(), measured)

    return _latest(known.times, (shape, names), times)


def _latest(kept: dict[_Key, T], key: _Key, make: Callable[[], T]) -> T:
    """The value of a key, made where there is none; the keys that were asked for longest ago are forgotten."""
    value = kept.pop(key, None)
    kept[key] = value = make() if value is None else value
    while len(kept) > KEPT_BATCHES:
        kept.pop(next(iter(kept)), None)
    return value


def _is_alone() -> bool:
    """Whether no other process takes part."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


# ---------------------------------------------------------------- before anything is measured


class DevicePrior(NamedTuple):
    """What a forward pass may take on a device, in the time of reading one weight.

    Attributes:
        saturation: tokens whose arithmetic takes as long as reading the weights.
        layer: what it takes to dispatch the operations of a decoder layer.
    """

    saturation: float
    layer: float

    def of_pass(self, weights: int, layers: int, tokens: int) -> float:
        """A pass of a model over so many tokens."""
        return weights * (1 + tokens / self.saturation) + layers * self.layer


CPU_PRIOR = DevicePrior(saturation=5, layer=6e5)
"""A CPU core, measured in float32 on a base of 3 M and one of 46 M parameters, see LOG.md."""
ACCELERATOR_PRIOR = DevicePrior(saturation=256, layer=3e8)
"""Estimates: a layer's forty kernels take some 0.3 ms to launch, in which 2 TB/s read 3e8 weights of two bytes."""


def prior_costs(adapter: ShadowAdapter, rows: int, shares: Shares | None = None, head_share: float = 1.0) -> Costs:
    """Costs by weights, layers and rows: drafting is a pass of backbones and head, verifying adds tokens to a pass."""
    base_model, decoder = adapter.base_model, adapter.decoder
    device = CPU_PRIOR if base_model.device.type == "cpu" else ACCELERATOR_PRIOR
    head = _num_weights(base_model.get_output_embeddings())
    base_weights = _num_weights(decoder.backbone) - _num_weights(input_embeddings(decoder.backbone)) + head
    base_pass = device.of_pass(base_weights, len(decoder.layers), rows)
    drafting = device.of_pass(round(head_share * head), 0, rows)
    for drafter, own_rows in [(adapter, rows)] if shares is None else shares.values():
        backbone = drafter.shadow_model
        weights = _num_weights(backbone) - _num_weights(input_embeddings(backbone))
        drafting += device.of_pass(weights, getattr(backbone.config, "num_hidden_layers", 1), own_rows)
    return Costs(drafting / base_pass, base_weights * rows / device.saturation / base_pass)


def _num_weights(module: nn.Module | None) -> int:
    """Number of parameters of a module, if there is one."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())
