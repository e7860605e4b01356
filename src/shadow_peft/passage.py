"""One forward pass of an attached adapter: the shadow state on its way through the base's layers.

    for each ridden layer l:   h = inject(h, s)   h = layer_l(h)   s = update(h, s)

Where gradients are wanted, the update waits for the next layer, so that both are one step (see `between`); if the base does
something of its own between the two, they stay two.

A passage lives as long as one call. It computes in the dtype and on the device of the base's hidden states, so a base in
bf16, a residual stream in float32 or a base spread over devices needs nothing special; autocast is suspended, since it would
round the residual stream.

Some architectures widen the residual stream between layers; `Stream` says how the shadow state meets it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shadow_peft.between import between
from shadow_peft.injection import ShadowInjectionModel, inject
from shadow_peft.layouts import Stream
from shadow_peft.update import Norm, ShadowUpdateModel, UpdateMaps, update


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
        self._waiting: tuple[Tensor, int] | None = None
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
        together = self._is_untouched(h)
        if self._waiting is not None and not together:
            self._update(index - 1, self._waiting[0])
        self._waiting = None
        wide, state = self._met(h)
        down, up = self._maps[index]
        if not self._is_home(h):
            down, up = down.to(h.device, h.dtype), up.to(h.device, h.dtype)
        settings = (self._alpha, self._dropout, self._drop_difference)
        with _exactly(h):
            if not torch.is_grad_enabled():
                return inject(wide, state, down, up, *settings).view_as(h)
            maps, norm = self._updating(index - 1, h) if together else (None, None)
            corrected, self.state = between(wide, state, down, up, *settings, maps, norm)
            return corrected.view_as(h)

    def after(self, index: int, h: Tensor) -> None:
        """Move the shadow state on with the output of ridden layer `index`, now or together with the next injection."""
        if torch.is_grad_enabled():
            self._waiting = h, _version(h)
        else:
            self._update(index, h)

    def _update(self, index: int, h: Tensor) -> None:
        wide, state = self._met(h)
        maps, norm = self._updating(index, h)
        with _exactly(h):
            self.state = update(wide, state, maps, norm, self._dropout)

    def _updating(self, index: int, h: Tensor) -> tuple[UpdateMaps, Norm | None]:
        """The maps of an update where `h` is."""
        maps, norm = self._updates[index], self._norm
        return (maps, norm) if self._is_home(h) else (maps.to(h.device, h.dtype), _moved(norm, h))

    def _is_untouched(self, h: Tensor) -> bool:
        """Whether `h` is the output of the layer before, and not another tensor nor changed in place."""
        return self._waiting is not None and self._waiting[0] is h and self._waiting[1] == _version(h)

    def _is_home(self, h: Tensor) -> bool:
        return h.dtype == self._dtype and h.device == self._device

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


def _version(h: Tensor) -> int:
    """How often `h` was changed in place; a compiler cannot tell, and no base of transformers changes it between layers."""
    return 0 if torch.compiler.is_compiling() else h._version


def _moved(norm: Norm | None, h: Tensor) -> Norm | None:
    return None if norm is None else Norm(norm.weight.to(h.device, h.dtype), norm.bias.to(h.device, h.dtype))
