"""How a causal LM turns its decoder's states into logits, as its class computes it, measured on a small random head.

    logits = cap(scale * W h + bias_scale * b)        cap(z) = c * tanh(z / c), or z where there is no cap

h [d] is a state of the decoder; W [V, d] and b [V] are the output embedding. `scale` holds whatever the class multiplies:
Cohere's and Granite's logits, MiniCPM's states. A class that computes anything else has no such form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadow_peft.base.decoder import Decoder
from shadow_peft.base.task_head import TaskHead

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names that configs have for c, Gemma's first."""

_ROWS, _STATES = 16, 8
_TOLERANCE = 1e-4  # some classes compute logits in float32 whatever the weights are


class CannotFold(ValueError):
    """No stock class computes what projection and head compute together."""


@dataclass(frozen=True)
class HeadForm:
    """The numbers in the formula of a class; `cap` is None where there is none."""

    scale: float
    bias_scale: float
    cap: float | None


def softcap_of(config: PreTrainedConfig) -> float | None:
    """c of logits = c * tanh(logits / c), where a config caps the logits."""
    values = config.get_text_config(decoder=True).to_dict()
    return next((values[name] for name in SOFTCAPS if values.get(name)), None)


def softcap_name(config: PreTrainedConfig) -> str | None:
    """The name that a config has for c; None where its class caps no logits."""
    return next((name for name in SOFTCAPS if name in config.to_dict()), None)


@torch.no_grad()
def measure_head(model: PreTrainedModel, decoder: Decoder) -> HeadForm:
    """The form of a causal LM's head.

    Args:
        model: the causal LM.
        decoder: its decoder.

    Raises:
        CannotFold: it computes its logits in another form.
    """
    device, width = model.get_output_embeddings().weight.device, decoder.hidden_size
    if device.type in ("meta", "mps"):  # offloaded; without float64
        device = torch.device("cpu")
    generator, double = torch.Generator().manual_seed(0), {"device": device, "dtype": torch.float64}
    probe = nn.Linear(width, _ROWS, **double)
    for parameter in probe.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
    states = 0.1 * torch.randn(1, _STATES, width, generator=generator).to(**double)
    try:
        head = TaskHead(model, decoder.head_input_path, probe, width=width)
        at_zero, at_states = head(torch.zeros_like(states)).double(), head(states).double()
    except RuntimeError as error:  # layers of another width, or of the base's own dtype
        raise _another_form(model) from error
    cap = softcap_of(model.config)
    if cap is not None:
        at_zero, at_states = (torch.atanh(logits / cap) * cap for logits in (at_zero, at_states))
    scale = _factor(model, states @ probe.weight.T, at_states - at_zero)
    return HeadForm(scale, _factor(model, probe.bias.expand_as(at_zero), at_zero), cap)


def _factor(model: PreTrainedModel, plain: Tensor, full: Tensor) -> float:
    """f in `full = f * plain`; exactly 1 where it is 1 up to rounding."""
    if plain.shape != full.shape:
        raise _another_form(model)
    factor = float((plain * full).sum() / plain.square().sum())
    if not torch.allclose(plain * factor, full, rtol=_TOLERANCE, atol=_TOLERANCE * float(full.abs().max())):
        raise _another_form(model)
    return 1.0 if abs(factor - 1.0) < 1e-6 else factor


def _another_form(model: PreTrainedModel) -> CannotFold:
    return CannotFold(f"{type(model).__name__} computes its logits with more than one linear layer")
