"""Forward hooks on a base's decoder layers, and removing them exactly.

All that a shadow does to a foreign model is a pair of forward hooks on unmodified layers: names, classes, state dict and
`save_pretrained` of the base stay what they were. The hooks do nothing unless a coupling is active in the calling thread.
The state of a forward pass (the shadow state) belongs to its coupling, never to a module; so a bare call of the base is
the bare base, several attachments share one base, and dropping a wrapper leaves hooks that do nothing. What else changes
with the first attachment, such as what is trainable, is in the base's record (see `base.record`): the last attachment to
go puts it back.

transformers checkpoints a layer's `forward`, so these hooks stay outside the region that a backward pass recomputes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from shadow_peft.base import peft_adapters
from shadow_peft.base.record import BaseRecord


class LayerCallbacks(Protocol):
    """What one forward pass does at the decoder layers, counted from 0; `coupling.Coupling` implements it."""

    def pre_layer(self, layer: int, h: Tensor) -> Tensor:
        """The corrected input `[B, T, d]` of a layer; `h` itself where it is not adapted."""

    def post_layer(self, layer: int, h: Tensor) -> Tensor | None:
        """Replacement of the output `[B, T, d]` of a layer, or None."""

    def final_hidden(self, h: Tensor) -> Tensor | None:
        """Replacement of the final hidden state `[B, T, d]`, or None."""

    def pre_head(self, h: Tensor) -> Tensor | None:
        """Replacement of the input `[B, T, d]` of the base's own head, or None."""


class Attachment:
    """The hooks of one model on one base, and the coupling that is active in each thread.

    Args:
        layers: all decoder layers, in order.
        first_layer: index of the first layer to hook.
        layer_input_name: keyword of the hidden state in a call of a layer.
        output_module: the model whose first output is the final hidden state.
        head: the base's output embedding, when its input is wanted too.
        record: what the base was before its first attachment.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        first_layer: int,
        layer_input_name: str,
        output_module: nn.Module,
        head: nn.Module | None,
        record: BaseRecord,
    ) -> None:
        self._thread = threading.local()
        self.record = record
        self._holder: Any = None
        self._hooked = [output_module]
        self.hook_layers(layers, first_layer, layer_input_name)
        output_module.register_forward_hook(_FinalHidden(self))
        self.hook_head(head)

    def hook_layers(self, layers: Sequence[nn.Module], first_layer: int, layer_input_name: str) -> None:
        """Hook the decoder layers from `first_layer` on that have no hooks yet."""
        for index, layer in enumerate(layers):
            if index >= first_layer and layer not in self._hooked:
                self._hooked.append(layer)
                layer.register_forward_pre_hook(_PreLayer(self, index, layer_input_name), with_kwargs=True)
                layer.register_forward_hook(_PostLayer(self, index))

    def hook_head(self, head: nn.Module | None) -> None:
        """Hook the base's output embedding, which may have been replaced since."""
        if head is not None and head not in self._hooked:
            self._hooked.append(head)
            head.register_forward_pre_hook(_PreHead(self))

    @property
    def coupling(self) -> LayerCallbacks | None:
        """The coupling that is active in this thread."""
        return getattr(self._thread, "coupling", None)

    @contextmanager
    def active(self, coupling: LayerCallbacks | None) -> Iterator[None]:
        """Inside the context, forward passes of the base in this thread run coupled, or bare."""
        self._thread.coupling = coupling
        try:
            yield
        finally:
            self._thread.coupling = None

    @property
    def enabled(self) -> bool:
        """False inside `disabled()`, in this thread."""
        return getattr(self._thread, "enabled", True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the context, no coupling becomes active in this thread."""
        before, self._thread.enabled = self.enabled, False
        try:
            yield
        finally:
            self._thread.enabled = before

    def hold(self, holder: object) -> None:
        """Be the attachment of a wrapper, with which it goes; a copy of the base alone has attachments that nobody holds."""
        self._holder = weakref.ref(holder)
        weakref.finalize(holder, self.detach)

    @property
    def is_held(self) -> bool:
        """Whether a wrapper uses this attachment."""
        return self._holder is not None and self._holder() is not None

    def detach(self) -> None:
        """Remove every hook of this attachment from the base."""
        for module in self._hooked:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(hook, _Hook) and hook.attachment is self:
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
        self._hooked = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_hooked": self._hooked, "record": self.record}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local(), _holder=None)


def attachments_of(base: nn.Module) -> list[Attachment]:
    """The attachments on a base that a wrapper uses."""
    return [attachment for attachment in _all_attachments(base) if attachment.is_held]


def _all_attachments(base: nn.Module) -> list[Attachment]:
    found: dict[int, Attachment] = {}
    for module in base.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, _Hook):
                found[id(hook.attachment)] = hook.attachment
    return list(found.values())


@contextmanager
def restored_on_failure(base: PreTrainedModel) -> Iterator[BaseRecord]:
    """Whatever fails inside the context leaves the base as it was; the context is its record."""
    record, attachments = BaseRecord(base), _all_attachments(base)
    adapters = [(p, p.detach().clone()) for p in peft_adapters.adapter_parameters(base).values()]
    try:
        yield record
    except BaseException:
        for attachment in _all_attachments(base):
            if not any(attachment is other for other in attachments):
                attachment.detach()
        record.keep_changes(base)
        record.restore(base)
        with torch.no_grad():
            for parameter, value in adapters:
                parameter.copy_(value)
        raise


class _Hook:
    """A hook that knows its attachment, so that copies of a base carry copies that know theirs."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment


class _PreLayer(_Hook):
    def __init__(self, attachment: Attachment, index: int, input_name: str) -> None:
        super().__init__(attachment)
        self.index = index
        self.input_name = input_name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        coupling = self.attachment.coupling
        if coupling is None:
            return None
        if args:
            return (coupling.pre_layer(self.index, args[0]), *args[1:]), kwargs
        return args, {**kwargs, self.input_name: coupling.pre_layer(self.index, kwargs[self.input_name])}


class _PostLayer(_Hook):
    def __init__(self, attachment: Attachment, index: int) -> None:
        super().__init__(attachment)
        self.index = index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        coupling = self.attachment.coupling
        if coupling is None:
            return None
        h = coupling.post_layer(self.index, _first(output))
        return None if h is None else _with_first(output, h)


class _FinalHidden(_Hook):
    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        coupling = self.attachment.coupling
        if coupling is None:
            return None
        h = coupling.final_hidden(_first(output))
        return None if h is None else _with_first(output, h)


class _PreHead(_Hook):
    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        coupling = self.attachment.coupling
        h = None if coupling is None else coupling.pre_head(args[0])
        h = packed(args[0]) if h is None else h
        return None if h is args[0] else (h, *args[1:])


def packed(h: Tensor) -> Tensor:
    """`h` `[B, T, d]` without gaps between its rows.

    Of a slice, such as the last tokens, torch's `matmul` makes a batch of products where the weight needs no gradient, and
    copies the weight for it: on a CPU a frozen head then costs twenty times its product. So freezing a base slows it too.
    """
    dense = h.dim() != 3 or h.stride(0) == h.shape[1] * h.shape[2]
    return h if dense else h.clone(memory_format=torch.contiguous_format)


def _first(output: Any) -> Tensor:
    """The hidden state that a module returned, alone or before other things."""
    return output if isinstance(output, Tensor) else output[0]


def _with_first(output: Any, h: Tensor) -> Any:
    """What a module returned, with another hidden state."""
    if isinstance(output, Tensor):
        return h
    if isinstance(output, ModelOutput):
        states = output.get("hidden_states")
        if states and states[-1] is _first(output):
            output["hidden_states"] = (*states[:-1], h)  # the last of them is what the head reads
        output[next(iter(output))] = h
        return output
    return (h, *output[1:])
