"""A task class's own computation of logits from the final hidden state, without its decoder.

`logits = head(h)` must mean for the shadow what it means for the base: softcapping, logit scales and multi-layer heads
included. Instead of repeating every architecture's arithmetic, the head is the task model itself with a stub for the decoder
that returns the state it is given. It shares every module with the base and copies no tensor.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from shadow_peft.base.hooks import packed


class _HiddenStateOnly(BaseModelOutputWithPast):
    """A decoder's output that holds the hidden state alone; whatever else a task class asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _DecoderStub(nn.Module):
    """Replaces the decoder: returns what it is given as embeddings; every other attribute is the decoder's."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["decoder"] = decoder  # beside the modules, so that it is not walked, moved or saved

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _HiddenStateOnly:
        return _HiddenStateOnly(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """`root` with another module at a dotted path: a view that shares every other module and parameter with `root`.

    Hooks on `root` itself, or on a module on the way, belong to their calls and not to the view's.

    Raises:
        AttributeError: there is no module at the path.
    """
    if not path:
        return module
    name, _, rest = path.partition(".")
    view = copy.copy(root)
    view.__dict__.pop("forward", None)  # accelerate binds the original's forward to the instance
    view.__dict__.update({hooks: OrderedDict() for hooks in view.__dict__ if hooks.endswith("_hooks")})
    view._modules = dict(root._modules)
    view._modules[name] = replace_module(root.get_submodule(name), rest, module)
    return view


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """A model's input embedding table, or None where it has none."""
    try:
        table: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises when the table was taken away
        return None
    return table


def path_of(root: nn.Module, module: nn.Module) -> str:
    """Dotted path of a module inside `root`.

    Raises:
        ValueError: `root` does not contain it.
    """
    for name, candidate in root.named_modules():
        if candidate is module:
            return name
    raise ValueError(f"{type(root).__name__} does not contain the given {type(module).__name__}.")


class TaskHead:
    """`head(h)`: logits `[B, T, V]` of final hidden states `[B, T, d]`, as the base's own class computes them.

    States `[N, d]` have logits `[N, V]`. The kind of head is found once, by a trial on a few random states.

    Args:
        base: a causal language model.
        head_input_path: where the model is whose output the head reads, see `base.decoder.Decoder`.
        output_embeddings: a module that replaces the base's output embedding, such as a trained copy.
        width: d.

    Attributes:
        reads_states: whether the output embedding is given the states themselves, with nothing before it.
        is_linear: whether also nothing comes after it: the logits are its product with the states.
    """

    def __init__(
        self, base: PreTrainedModel, head_input_path: str, output_embeddings: nn.Module | None = None, *, width: int
    ) -> None:
        view = replace_module(base, head_input_path, _DecoderStub(base.get_submodule(head_input_path)))
        if output_embeddings is not None:
            view = replace_module(view, path_of(base, base.get_output_embeddings()), output_embeddings)
        self._view, self._dtype = view, base.dtype
        self._output: Any = base.get_output_embeddings() if output_embeddings is None else output_embeddings
        self.reads_states, self.is_linear = self._probe(width)

    def __call__(self, h: Tensor) -> Tensor:
        """The logits of `h`."""
        h = packed(h)
        linear = None if torch.is_grad_enabled() else self.linear_for(h)
        return self._logits(h) if linear is None else F.linear(h.to(linear[0].dtype), *linear)

    def apply_to_modules(self, *args: Any, **kwargs: Any) -> None:
        """What `nn.Module.to` does to its parts, for the modules of the head; they are those of its base."""
        self._view._apply(*args, **kwargs)

    def _logits(self, h: Tensor) -> Tensor:
        dtype = self._output.weight.dtype
        h = h.to(dtype) if dtype.is_floating_point else h
        batch = h if h.dim() == 3 else h.unsqueeze(0)  # task classes index the three dimensions of a batch
        logits: Tensor = self._view(inputs_embeds=batch, use_cache=False, return_dict=True).logits
        return logits if h.dim() == 3 else logits.squeeze(0)

    def linear_for(self, h: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight `[V, d]` and bias, where the logits are a linear map of `h` whose whole weight is in memory in float32.

        Weights that a trainer has sharded, that are offloaded between calls, or that half precision or autocast would round
        are left to the head itself.
        """
        if not self.is_linear or torch.is_autocast_enabled(h.device.type):
            return None
        weight, bias = self._output.weight, self._output.bias
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in (torch.float32, torch.float64):
            return None
        return (weight, bias) if weight.device == h.device and weight.shape[-1:] == h.shape[-1:] else None

    def is_frozen_for(self, h: Tensor) -> bool:
        """Whether nothing in the head is trained and its output embedding is in memory, whole, on the device of `h`.

        Never in a compiled graph, which `losses.frozen_head` would break.
        """
        weight = self._output.weight
        whole = type(weight) in (nn.Parameter, Tensor) and weight.dim() == 2 and weight.device == h.device
        return whole and not torch.compiler.is_compiling() and not any(p.requires_grad for p in self._view.parameters())

    @torch.no_grad()
    def select(self, ids: Tensor, vocab_size: int) -> tuple[Tensor, ...] | None:
        """Weight `[S, d]`, and bias `[S]` if there is one, of token ids `[S]` among V.

        None where the logits are no linear map of the states to V, or the whole weight is not in memory on the ids' device.
        """
        weight, bias = self._output.weight, self._output.bias
        if not self.is_linear or type(weight) not in (nn.Parameter, Tensor):
            return None
        if weight.dim() != 2 or len(weight) != vocab_size or weight.device != ids.device:
            return None
        return tuple(part.index_select(0, ids) for part in (weight, bias) if part is not None)

    @torch.no_grad()
    def _probe(self, width: int) -> tuple[bool, bool]:
        weight: Tensor = self._output.weight
        seen: list[Tensor] = []
        offloaded = "_hf_hook" in self._output.__dict__
        if weight.is_meta and not offloaded:
            return False, False
        states = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
        states = states.to(torch.device("cpu") if weight.is_meta else weight.device)
        states = states.to(weight.dtype if weight.is_floating_point() else self._dtype)
        hook = self._output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            logits = self._logits(states)
        finally:
            hook.remove()
        reads_states = len(seen) == 1 and seen[0].shape == states.shape and torch.equal(seen[0].to(states), states)
        if not reads_states or offloaded or type(self._output) is not nn.Linear or weight.shape[-1] != width:
            return reads_states, False
        return True, torch.equal(logits, F.linear(states, weight, self._output.bias))
