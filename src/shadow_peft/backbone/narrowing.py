"""An implicit backbone that is narrower than its base, initialised from the base by projecting the residual stream.

Q `[d, S]` are the S directions that hold most of the base's states x, each taken at unit length. With y = Q^T x

    embeddings              E' = E Q
    weights that read x     W' = W diag(g) Q sqrt(d / S)        g the weight of the RMSNorm before them, whose own is 1
    weights that write to x W' = Q^T W
    projection              P  = diag(g) Q sqrt(d / S)          g that of the last RMSNorm

RMSNorm divides by |y| / sqrt(S) where it divided by |x| / sqrt(d), hence the factor. Where all states lie in the span of Q,
the narrow backbone computes what the wide one does. Neurons and heads are pruned as at full width, see `pruning`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.backbone.dequantize import dequantized_view
from shadow_peft.backbone.implicit import materialized
from shadow_peft.backbone.pruning import WeightSlice, select_slices
from shadow_peft.backbone.truncated_config import selected_layers
from shadow_peft.base.architectures import ATTENTION, MLP
from shadow_peft.base.decoder import Decoder
from shadow_peft.config import ShadowConfig

_ATTENTION, _MLP = "self_attn", "mlp"
_NORMS = {_ATTENTION: "input_layernorm", _MLP: "post_attention_layernorm"}
"""Part of a layer -> the RMSNorm before it."""
_LAST_NORM = "norm"
_READS = {*ATTENTION, *MLP} - {ATTENTION.output, MLP.down}


class CannotNarrowError(ValueError):
    """The base's layers are not of the kind that can be projected."""


@torch.no_grad()
def main_directions(states: Iterable[Tensor], width: int) -> Tensor:
    """Q `[d, S]` in float64, orthonormal: the S directions that hold most of states `[..., d]`, each taken at unit length.

    Raises:
        ValueError: there are no states.
    """
    gram: Tensor | None = None
    for part in states:
        x = part.flatten(0, -2).double()
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        gram = x.T @ x if gram is None else gram.addmm_(x.T, x)
    if gram is None:
        raise ValueError("There are no states to find directions in.")
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -width:]
    return vectors


@torch.no_grad()
def init_narrow(
    backbone: PreTrainedModel, projection: nn.Linear, decoder: Decoder, config: ShadowConfig, basis: Tensor
) -> None:
    """Initialise a narrow backbone with its embedding table and its projection from a base.

    Args:
        backbone: an implicit backbone of another width than the base.
        projection: P, `[d, S]`.
        decoder: the base's decoder.
        config: what the backbone was made by.
        basis: Q `[d, S]`.

    Raises:
        CannotNarrowError: a layer has parts other than RMSNorms, an attention and an MLP under the usual names.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    targets = dict(enumerate(backbone.get_submodule(decoder.layers_path).children()))
    head_dim = getattr(decoder.config, "head_dim", None)
    for index, number in enumerate(selected_layers(decoder, config)):
        source = decoder.layers[number]
        with materialized(source):
            plain = dequantized_view(source)
            copies += _layer(targets[index], plain, select_slices(targets[index], plain, head_dim), basis)
    last = _norm_weight(decoder.backbone, _LAST_NORM)
    copies.append((_parameter(backbone, f"{_LAST_NORM}.weight"), torch.ones(basis.shape[1])))
    copies.append((projection.weight, last[:, None] * basis * _scale(basis)))
    table, own = decoder.backbone.get_input_embeddings(), backbone.get_input_embeddings()
    with materialized(table):
        copies.append((own.weight, dequantized_view(table).get_parameter("weight").double() @ basis))
    for target, value in copies:
        if target.shape != value.shape:
            raise CannotNarrowError(
                f"a projected weight has the shape {tuple(value.shape)}, its place {tuple(target.shape)}"
            )
    for target, value in copies:
        target.copy_(value)


def _layer(
    target: nn.Module, source: nn.Module, slices: dict[str, WeightSlice], basis: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(parameter of the narrow layer, its value) for all of them."""
    norms = {part: _norm_weight(source, norm) for part, norm in _NORMS.items()}
    values: dict[str, Tensor] = dict(source.named_parameters())
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, parameter in target.named_parameters():
        part, _, inside = name.partition(".")
        map_name, _, kind = inside.partition(".")
        if name in {f"{norm}.weight" for norm in _NORMS.values()}:
            pairs.append((parameter, torch.ones_like(parameter)))
            continue
        value = values.get(name)
        if value is None or part not in norms:
            raise CannotNarrowError(f"the base's layers have a part {name!r} that is not known")
        if f"{part}.{map_name}" in slices:
            value = slices[f"{part}.{map_name}"].of(value)
        pairs.append((parameter, _projected(value.double(), map_name, kind, norms[part], basis)))
    return pairs


def _projected(value: Tensor, map_name: str, kind: str, norm: Tensor, basis: Tensor) -> Tensor:
    """A weight or bias of the narrow layer; what neither reads nor writes the stream stays, such as the norm of keys."""
    if map_name in _READS:
        return (value * norm) @ basis * _scale(basis) if kind == "weight" else value
    return basis.T @ value if map_name in (ATTENTION.output, MLP.down) else value


def _scale(basis: Tensor) -> float:
    return math.sqrt(basis.shape[0] / basis.shape[1])


def _norm_weight(module: nn.Module, name: str) -> Tensor:
    """g `[d]` of an RMSNorm x -> g * x / rms(x).

    Raises:
        CannotNarrowError: there is none of the name, or it computes something else.
    """
    norm = getattr(module, name, None)
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None:
        raise CannotNarrowError(f"the base has no norm {name!r} there")
    x = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = weight.double() * x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    if not torch.allclose(norm(x).double(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise CannotNarrowError(f"the base's {type(norm).__name__} is no RMSNorm that multiplies by its weight")
    return weight.detach().double()


def _parameter(module: nn.Module, name: str) -> Tensor:
    try:
        return module.get_parameter(name)
    except AttributeError:
        raise CannotNarrowError(f"the backbone has no {name!r}") from None
