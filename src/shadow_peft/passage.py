"""One forward pass of an attached adapter: the shadow state on its way through the base's layers.

    for each ridden layer l:   h = inject(h, s)   h = layer_l(h)   s = update(h, s)

A passage lives as long as one call. It computes in the dtype and on the device of the base's hidden states, so a base in
bf16, a residual stream in float32 or a base spread over devices needs nothing special; autocast is suspended, since it would
round the residual stream.

Some architectures widen the residual stream between layers; `Stream` says how the shadow state meets it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shadow_peft.injection import ShadowInjectionModel, inject
from shadow_peft.layouts import Stream
from shadow_peft.update import Norm, ShadowUpdateModel, update


class LayerPassage:
    """Inject before a layer, update after it (see `attach.Passage`).

    Args:
        state: initial shadow state s, `[B, T, d]`.
        injection: the injection maps of the ridden layers.
        updating: the update maps of all ridden layers but the last.
        alpha: factor of the injected correction.
        dropout: probability of dropping; 0 outside training.
        drop_difference: where injection drops, see `injection.inject`.
        stream: how the base's residual stream is laid out.
        dtype: dtype that the base computes in; maps are cast to it once.
        catch_head_input: keep the base's final hidden state and hand its own head an empty one.
    """

    def __init__(
        self,
        state: Tensor,
        injection: ShadowInjectionModel,
        updating: ShadowUpdateModel,
        *,
        alpha: float,
        dropout: float,
        drop_difference: bool,
        stream: Stream,
        dtype: torch.dtype,
        catch_head_input: bool = False,
    ) -> None:
        self.state = stream.enter(state)
        self.head_input: Tensor | None = None
        self._maps = injection.maps(dtype)
        self._updates = updating.maps(dtype)
        self._norm = updating.norm(dtype)
        self._alpha = alpha
        self._dropout = dropout
        self._drop_difference = drop_difference
        self._stream = stream
        self._dtype = dtype
        self._device = injection.injection_downs.device
        self._catch_head_input = catch_head_input

    def before(self, index: int, h: Tensor) -> Tensor:
        """The corrected input of ridden layer `index`, in the shape and dtype of `h`."""
        wide, state = self._met(h)
        down, up = self._maps[index]
        if h.dtype != self._dtype or h.device != self._device:
            down, up = down.to(h.device, h.dtype), up.to(h.device, h.dtype)
        with _exactly(h):
            return inject(wide, state, down, up, self._alpha, self._dropout, self._drop_difference).view_as(h)

    def after(self, index: int, h: Tensor) -> None:
        """Move the shadow state on with the output of ridden layer `index`."""
        wide, state = self._met(h)
        maps, norm = self._updates[index], self._norm
        if h.dtype != self._dtype or h.device != self._device:
            maps, norm = maps.to(h.device, h.dtype), _moved(norm, h)
        with _exactly(h):
            self.state = update(wide, state, maps, norm, self._dropout)

    def _met(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state and shadow state in one shape; Gemma 4 drops all but the last tokens midway if it needs no others."""
        wide = self._stream.split(h, self.state.shape[-1])
        if wide.shape[-2] < self.state.shape[-2]:
            self.state = self.state[..., -wide.shape[-2] :, :]
        return wide, self.state.to(h.device, h.dtype).expand_as(wide)

    def at_head(self, h: Tensor) -> Tensor | None:
        """Keep the final hidden state when it is wanted; the base's own head then computes no token."""
        if not self._catch_head_input:
            return None
        self.head_input = h
        return h[..., :0, :]


def _exactly(h: Tensor) -> AbstractContextManager[object]:
    """Compute in the dtype of `h`, even inside autocast."""
    kind = h.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _moved(norm: Norm | None, h: Tensor) -> Norm | None:
    return None if norm is None else Norm(norm.weight.to(h.device, h.dtype), norm.bias.to(h.device, h.dtype))
