"""One forward pass of an adapter: how the shadow's state corrects the base's layers.

    variants "published", "peft"   h = inject(h, s)   h = layer_l(h)   s = update(h, s)      for each adapted layer l
    variant "readout"              h = correct_output(layer_l(h + delta_l))                  and, at the end, read_out(h, s)

A coupling lives as long as one call. It computes in the dtype and on the device of the base's hidden states, so a base in
bf16, a residual stream in float32 or a base spread over devices needs nothing special; autocast is suspended, since it would
round the residual stream. One exception: `takes_float32` tells where the variant "readout" computes in float32.

Some architectures widen the residual stream between layers; `ResidualStream` says how the shadow state is aligned to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from shadow_peft.base.architectures import ResidualStream
from shadow_peft.layers.fused_update_injection import fused_update_injection
from shadow_peft.layers.injection import ShadowInjectionModel, inject
from shadow_peft.layers.output_correction import ShadowOutputModel, correct_output, inject_transient, unit_rms
from shadow_peft.layers.readout import ShadowReadoutModel
from shadow_peft.layers.update import Norm, ShadowUpdateModel, UpdateWeights, update

_NOTHING = nullcontext()

_FEW_TOKENS = 16
"""Up to so many tokens a product of rank 64 is as fast in float32 as in bfloat16, measured on a CPU with AVX-512 BF16."""


class Coupling:
    """What all variants share; implements `base.hooks.LayerCallbacks`.

    Args:
        state: initial shadow state s, `[B, T, d]`.
        injection: the injection weights of the adapted layers.
        first_layer: index of the first adapted layer of the base.
        alpha: factor of the injected correction.
        dropout: probability of dropping; 0 outside training.
        residual_stream: how the base's residual stream is laid out.
        dtype: dtype that the base computes in; weights are cast to it once.
        keep_head_input: keep the base's final hidden state in `head_input` and give its own head an empty one.
    """

    def __init__(
        self,
        state: Tensor,
        injection: ShadowInjectionModel,
        *,
        first_layer: int,
        alpha: float,
        dropout: float,
        residual_stream: ResidualStream,
        dtype: torch.dtype,
        keep_head_input: bool = False,
    ) -> None:
        self.head_input: Tensor | None = None
        self._initial = state
        self._first_layer = first_layer
        self._injection_weights = injection.weights(dtype)
        self._alpha = alpha
        self._dropout = dropout
        self._stream = residual_stream
        self._dtype = dtype
        self._device = injection.injection_downs.device
        self._keep_head_input = keep_head_input
        self._autocast: dict[str, bool] = {}

    def pre_layer(self, layer: int, h: Tensor) -> Tensor:
        """The corrected input of a layer of the base, in the shape and dtype of `h`; `h` itself where it is not adapted."""
        return h if layer < self._first_layer else self._pre_layer(layer - self._first_layer, h)

    def post_layer(self, layer: int, h: Tensor) -> Tensor | None:
        """Process the output of a layer of the base; its replacement, or None."""
        return None if layer < self._first_layer else self._post_layer(layer - self._first_layer, h)

    def _pre_layer(self, index: int, h: Tensor) -> Tensor:
        """The corrected input of adapted layer `index`."""
        raise NotImplementedError

    def _post_layer(self, index: int, h: Tensor) -> Tensor | None:
        """Process the output of adapted layer `index`."""
        raise NotImplementedError

    def final_hidden(self, h: Tensor) -> Tensor | None:
        """Replacement of the final hidden state, or None; keeps the head's input if asked to."""
        replacement = self._read_out(h)
        if self._keep_head_input:
            self.head_input = h if replacement is None else replacement
        return replacement

    def pre_head(self, h: Tensor) -> Tensor | None:
        """No tokens for the base's own head where its input is kept; else None."""
        return h[..., :0, :] if self._keep_head_input else None

    def _read_out(self, h: Tensor) -> Tensor | None:
        """The final hidden state after a read-out, or None where the variant has none."""
        return None

    def _no_autocast(self, device_type: str) -> AbstractContextManager[object]:
        """`no_autocast` for the layers, which asks whether autocast is on at the first of them on a type of device."""
        if device_type not in self._autocast:
            self._autocast[device_type] = torch.is_autocast_enabled(device_type)
        return torch.autocast(device_type, enabled=False) if self._autocast[device_type] else _NOTHING

    def _same_placement(self, h: Tensor) -> bool:
        return h.dtype == self._dtype and h.device == self._device

    def _weights_at(self, h: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A pair of weights on the device and in the dtype of `h`."""
        down, up = weights
        return weights if self._same_placement(h) else (down.to(h.device, h.dtype), up.to(h.device, h.dtype))


class StaticStateCoupling(Coupling):
    """The variant "readout": every layer sees the initial shadow state.

    Args:
        state, injection, **settings: see `Coupling`.
        output: the weights of the output correction.
        readout: the weights of the read-out.
        normalize: whether the injection compares states of unit root mean square.
        dtype: dtype that the base computes in; few tokens may be corrected in float32, see `takes_float32`.
    """

    def __init__(
        self,
        state: Tensor,
        injection: ShadowInjectionModel,
        output: ShadowOutputModel,
        readout: ShadowReadoutModel,
        *,
        normalize: bool,
        dtype: torch.dtype,
        **settings: Any,
    ) -> None:
        self._in_float32 = takes_float32(state, dtype)
        super().__init__(state, injection, dtype=torch.float32 if self._in_float32 else dtype, **settings)
        self._readout = readout
        self._normalize = normalize
        self._output_weights = output.weights(self._dtype)
        self._state = self._stream.expand(unit_rms(state) if normalize else state)
        self._aligned: Tensor | None = None
        self._pending: tuple[Tensor, Tensor] | None = None

    def _pre_layer(self, index: int, h: Tensor) -> Tensor:
        """The corrected input of adapted layer `index`, in the shape and dtype of `h`."""
        wide, state = self._aligned_once(self._computed(h))
        down, up = self._weights_at(wide, self._injection_weights[index])
        settings = (self._alpha, self._dropout, self._normalize, h.dtype)
        with self._no_autocast(h.device.type):
            corrected, delta = inject_transient(wide, state, down, up, *settings)
        self._pending = wide, delta
        return corrected.view_as(h)

    def _post_layer(self, index: int, h: Tensor) -> Tensor:
        """The output of adapted layer `index` without the injected correction, and corrected itself."""
        assert self._pending is not None
        (h_in, delta), self._pending = self._pending, None
        out = self._computed(h)
        down, up = self._weights_at(out, self._output_weights[index])
        if (delta.dtype, delta.device) != (out.dtype, out.device):
            h_in, delta = h_in.to(out.device, out.dtype), delta.to(out.device, out.dtype)
        with self._no_autocast(h.device.type):
            corrected = correct_output(out.view_as(delta), delta, h_in, down, up).to(h.dtype)
        return corrected if corrected.shape == h.shape else corrected.view_as(h)  # a view would trouble FSDP

    def _computed(self, h: Tensor) -> Tensor:
        """A hidden state in the dtype that it is corrected in."""
        return h.float() if self._in_float32 else h

    def _aligned_once(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state and shadow state in one shape; without gradients the state is aligned once for all layers alike."""
        if self._aligned is not None and not torch.is_grad_enabled():
            wide, state = self._stream.split(h, self._state.shape[-1]), self._aligned
            if (state.shape, state.dtype, state.device) == (wide.shape, h.dtype, h.device):
                return wide, state
        wide, self._aligned = align(self._stream, self._state, h)
        return wide, self._aligned

    def _read_out(self, h: Tensor) -> Tensor:
        """The final hidden state after the read-out."""
        state = self._initial[..., -h.shape[-2] :, :]
        with no_autocast(h):
            replacement: Tensor = self._readout(self._computed(h), state).to(h.dtype)
            return replacement


class EvolvingStateCoupling(Coupling):
    """The variants "published" and "peft": the shadow state is updated after every layer.

    Where gradients are wanted, the update is deferred to the next layer and fused with its injection (see
    `layers.fused_update_injection`); if the base changes the hidden state between the two layers, they run one by one.

    Args:
        state, injection, **settings: see `Coupling`.
        updating: the update weights of all adapted layers but the last.
        dropout_before_down: where injection drops, see `layers.injection.inject`.
    """

    def __init__(
        self,
        state: Tensor,
        injection: ShadowInjectionModel,
        updating: ShadowUpdateModel,
        *,
        dropout_before_down: bool,
        **settings: Any,
    ) -> None:
        super().__init__(state, injection, **settings)
        self.state = self._stream.expand(state)
        self._deferred: tuple[Tensor, int] | None = None
        self._update_weights = updating.weights(self._dtype)
        self._norm = updating.norm(self._dtype)
        self._dropout_before_down = dropout_before_down

    def _pre_layer(self, index: int, h: Tensor) -> Tensor:
        """The corrected input of adapted layer `index`, in the shape and dtype of `h`."""
        fused = self._is_untouched(h)
        if self._deferred is not None and not fused:
            self._update(index - 1, self._deferred[0])
        self._deferred = None
        wide, state = self._align_state(h)
        down, up = self._weights_at(h, self._injection_weights[index])
        settings = (self._alpha, self._dropout, self._dropout_before_down)
        with self._no_autocast(h.device.type):
            if not torch.is_grad_enabled():
                return inject(wide, state, down, up, *settings).view_as(h)
            weights, norm = self._updating(index - 1, h) if fused else (None, None)
            corrected, self.state = fused_update_injection(wide, state, down, up, *settings, weights, norm)
            return corrected.view_as(h)

    def _post_layer(self, index: int, h: Tensor) -> None:
        """Update the shadow state with the output of adapted layer `index`, now or fused with the next injection."""
        if torch.is_grad_enabled():
            self._deferred = h, _version(h)
        else:
            self._update(index, h)

    def _update(self, index: int, h: Tensor) -> None:
        if index == len(self._update_weights):
            return
        wide, state = self._align_state(h)
        weights, norm = self._updating(index, h)
        with self._no_autocast(h.device.type):
            self.state = update(wide, state, weights, norm, self._dropout)

    def _updating(self, index: int, h: Tensor) -> tuple[UpdateWeights, Norm | None]:
        """The weights of an update on the device and in the dtype of `h`."""
        weights, norm = self._update_weights[index], self._norm
        return (weights, norm) if self._same_placement(h) else (weights.to(h.device, h.dtype), _move_norm(norm, h))

    def _is_untouched(self, h: Tensor) -> bool:
        """Whether `h` is the output of the layer before, and not another tensor nor changed in place."""
        return self._deferred is not None and self._deferred[0] is h and self._deferred[1] == _version(h)

    def _align_state(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state and shadow state in one shape."""
        wide, state = align(self._stream, self.state, h)
        self.state = self.state[..., -wide.shape[-2] :, :]
        return wide, state


def align(stream: ResidualStream, state: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden state and shadow state in one shape; Gemma 4 drops all but the last tokens midway if it needs no others."""
    wide = stream.split(h, state.shape[-1])
    state = state[..., -wide.shape[-2] :, :] if wide.shape[-2] < state.shape[-2] else state
    return wide, state.to(h.device, h.dtype).expand_as(wide)


def takes_float32(state: Tensor, dtype: torch.dtype) -> bool:
    """Whether to correct few tokens of a base in half precision in float32: on a CPU, without gradients.

    There the set-up of a thin product in half precision takes several times as long as the whole product in float32.
    """
    few = state.numel() <= _FEW_TOKENS * state.shape[-1]
    return few and dtype.itemsize < 4 and state.device.type == "cpu" and not torch.is_grad_enabled()


def no_autocast(h: Tensor) -> AbstractContextManager[object]:
    """Compute in the dtype of `h`, even inside autocast."""
    kind = h.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def _version(h: Tensor) -> int:
    """How often `h` was changed in place; a compiler cannot tell, and no base of transformers changes it between layers."""
    return 0 if torch.compiler.is_compiling() else h._version


def _move_norm(norm: Norm | None, h: Tensor) -> Norm | None:
    return None if norm is None else Norm(norm.weight.to(h.device, h.dtype), norm.bias.to(h.device, h.dtype))
