"""One forward pass of a batch whose rows belong to different adapters.

The rows of each variant are one group with a coupling of its own: that of the adapter where there is one, and a grouped one
with batched products where there are several. Rows of the bare base are in no group, so nothing touches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shadow_peft.base.architectures import ResidualStream
from shadow_peft.base.hooks import LayerCallbacks
from shadow_peft.coupling import align, no_autocast
from shadow_peft.layers import grouped
from shadow_peft.layers.output_correction import unit_rms
from shadow_peft.layers.readout import ReadoutWeights
from shadow_peft.layers.update import Norm
from shadow_peft.multi_adapter.weights import StackedWeights


class RowGroup(NamedTuple):
    """Rows of a batch, as an index `[n]` or None for all of them in order, and their coupling."""

    rows: Tensor | None
    coupling: LayerCallbacks

    def take(self, h: Tensor, dim: int) -> Tensor:
        """The group's rows of `h`."""
        return h if self.rows is None else h.index_select(dim, self.rows.to(h.device))

    def put(self, h: Tensor, part: Tensor | None, dim: int) -> Tensor:
        """`h` with the group's rows replaced; `h` itself if there is no replacement."""
        if part is None or self.rows is None:
            return h if part is None else part
        return h.index_copy(dim, self.rows.to(h.device), part)


class MixedCoupling:
    """The couplings of all groups; implements `base.hooks.LayerCallbacks`.

    Args:
        groups: the groups, no row in two of them.
        residual_stream: how the base's residual stream is laid out.
        keep_head_input: as in `coupling.Coupling`.

    Attributes:
        head_input: the final hidden state of all rows, if it is kept.
    """

    def __init__(self, groups: Sequence[RowGroup], residual_stream: ResidualStream, keep_head_input: bool) -> None:
        self.head_input: Tensor | None = None
        self._groups = groups
        self._rows_dim = residual_stream.rows_dim
        self._keep_head_input = keep_head_input

    def pre_layer(self, layer: int, h: Tensor) -> Tensor:
        """The input of a layer, corrected row by row."""
        for group in self._groups:
            h = group.put(h, group.coupling.pre_layer(layer, group.take(h, self._rows_dim)), self._rows_dim)
        return h

    def post_layer(self, layer: int, h: Tensor) -> Tensor | None:
        """The output of a layer with the replacements of all groups, or None if there is none."""
        result = h
        for group in self._groups:
            part = group.coupling.post_layer(layer, group.take(h, self._rows_dim))
            result = group.put(result, part, self._rows_dim)
        return None if result is h else result

    def final_hidden(self, h: Tensor) -> Tensor | None:
        """The final hidden state with the read-outs of all groups, or None if there is none; keeps the head's input."""
        result = h
        for group in self._groups:
            result = group.put(result, group.coupling.final_hidden(group.take(h, 0)), 0)
        if self._keep_head_input:
            self.head_input = result
        return None if result is h else result

    def pre_head(self, h: Tensor) -> Tensor | None:
        """No tokens for the base's own head where its input is kept; else None."""
        return h[..., :0, :] if self._keep_head_input else None


class GroupedCoupling:
    """What the grouped couplings share.

    Args:
        state: initial shadow state s of the group's rows, sorted by adapter, `[n, T, d]`.
        weights: the weights of P pieces; P divides n.
        first_layer: index of the first adapted layer of the base.
        residual_stream: how the base's residual stream is laid out.
        dropout: probability of dropping for each piece, `[P, 1, 1]`; None outside training.
        normalize: whether the injection compares states of unit root mean square.
    """

    def __init__(
        self,
        state: Tensor,
        weights: StackedWeights,
        first_layer: int,
        residual_stream: ResidualStream,
        dropout: Tensor | None,
        normalize: bool,
    ) -> None:
        self._initial = state
        self._normalize = normalize
        self._state = residual_stream.expand(unit_rms(state) if normalize else state)
        self._weights = weights
        self._num_pieces = len(weights.injection[0][0])
        self._first_layer = first_layer
        self._stream = residual_stream
        self._dropout = dropout

    def pre_head(self, h: Tensor) -> Tensor | None:
        """Nothing of its own."""
        return None

    def _pieces(self, x: Tensor, rows_dim: int | None = None) -> Tensor:
        """`[P, M, d]` of a state in the layout of the residual stream, whatever lies between rows and width."""
        return x.movedim(self._stream.rows_dim if rows_dim is None else rows_dim, 0).reshape(
            self._num_pieces, -1, x.shape[-1]
        )

    def _joined(self, pieces: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_pieces` for a state of the layout and shape of `like`."""
        dim = self._stream.rows_dim
        return pieces.reshape(like.movedim(dim, 0).shape).movedim(0, dim)

    def _drop(self, h: Tensor) -> Tensor | None:
        return None if self._dropout is None else self._dropout.to(h.device, h.dtype)


class GroupedStaticCoupling(GroupedCoupling):
    """Several adapters of the variant "readout"."""

    _pending: tuple[Tensor, Tensor] | None = None

    def pre_layer(self, layer: int, h: Tensor) -> Tensor:
        """The corrected input of a layer."""
        if layer < self._first_layer:
            return h
        wide, state = align(self._stream, self._state, h)
        down, up = _at(h, self._weights.injection[layer - self._first_layer])
        x = self._pieces(wide)
        with no_autocast(h):
            corrected, delta = grouped.inject_transient(x, self._pieces(state), down, up, self._drop(h), self._normalize)
        self._pending = x, delta
        return self._joined(corrected, wide).reshape(h.shape)

    def post_layer(self, layer: int, h: Tensor) -> Tensor | None:
        """The output of a layer without the injected correction, and corrected itself."""
        if layer < self._first_layer:
            return None
        assert self._pending is not None
        (x, delta), self._pending = self._pending, None
        wide = self._stream.split(h, x.shape[-1])
        down, up = _at(h, self._weights.output[layer - self._first_layer])
        with no_autocast(h):
            x, delta = (tensor.to(h.device, h.dtype) for tensor in (x, delta))
            corrected = grouped.correct_output(self._pieces(wide), delta, x, down, up)
        return self._joined(corrected, wide).reshape(h.shape)

    def final_hidden(self, h: Tensor) -> Tensor | None:
        """The final hidden state after the read-out."""
        assert self._weights.readout is not None
        state = self._initial[..., -h.shape[-2] :, :].to(h.device, h.dtype)
        weights = ReadoutWeights(*(tensor.to(h.device, h.dtype) for tensor in self._weights.readout))
        with no_autocast(h):
            return grouped.read_out(self._pieces(h, 0), self._pieces(state, 0), weights).reshape(h.shape)


class GroupedEvolvingCoupling(GroupedCoupling):
    """Several adapters of the variant "published", or several of the variant "peft"."""

    def pre_layer(self, layer: int, h: Tensor) -> Tensor:
        """The corrected input of a layer."""
        if layer < self._first_layer:
            return h
        wide, state = align(self._stream, self._state, h)
        down, up = _at(h, self._weights.injection[layer - self._first_layer])
        with no_autocast(h):
            corrected = grouped.inject(
                self._pieces(wide), self._pieces(state), down, up, self._drop(h), self._weights.norm is None
            )
        return self._joined(corrected, wide).reshape(h.shape)

    def post_layer(self, layer: int, h: Tensor) -> None:
        """Update the shadow state with the output of a layer."""
        index = layer - self._first_layer
        if not 0 <= index < len(self._weights.update):
            return
        wide, state = align(self._stream, self._state, h)
        weights, norm = self._weights.update[index].to(h.device, h.dtype), self._weights.norm
        norm = None if norm is None else Norm(*_at(h, (norm.weight, norm.bias)))
        with no_autocast(h):
            updated = grouped.update(self._pieces(wide), self._pieces(state), weights, norm, self._drop(h))
        self._state = self._joined(updated, wide)

    def final_hidden(self, h: Tensor) -> None:
        """The variant has no read-out."""


def _at(h: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A pair of tensors on the device and in the dtype of `h`."""
    first, second = weights
    return first.to(h.device, h.dtype), second.to(h.device, h.dtype)


def dropout_of(probabilities: Sequence[float], pieces: Sequence[int], device: torch.device) -> Tensor | None:
    """The probability of dropping for each piece, `[P, 1, 1]`; None if nothing is dropped."""
    if not any(probabilities):
        return None
    return torch.tensor([probabilities[index] for index in pieces], device=device)[:, None, None]
