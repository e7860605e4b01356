"""Which MLP neurons and attention heads a narrower twin keeps of a base layer: those that weigh most.

    neuron j          weight  |up[j]| * |down[:, j]|  (times |gate[j]| where there is a gate)
    key/value group   weight  |v[group]| * |o[:, heads of group]|; in each kept group, the query heads of largest
                      |o[:, head]|

Norms are Euclidean. The kept ones stay in the order of the base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shadow_peft.base.architectures import ATTENTION, MLP


@dataclass(frozen=True)
class WeightSlice:
    """Rows (outputs) and columns (inputs) of one linear map that the twin keeps; None keeps all."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The kept part of a weight `[out, in]` or bias `[out]`."""
        if self.rows is not None:
            tensor = tensor[self.rows]
        if self.columns is not None and tensor.dim() == 2:
            tensor = tensor[:, self.columns]
        return tensor


def select_slices(target: nn.Module, source: nn.Module, head_dim: int | None) -> dict[str, WeightSlice]:
    """What a narrower layer keeps of a base layer.

    Args:
        target: a decoder layer of the twin.
        source: the base's decoder layer that it follows, its weights at hand.
        head_dim: width of one attention head, the same in both; None where it is not declared.

    Returns:
        Path of each linear map inside the layer that must be narrowed -> what is kept of it. Maps of modules whose
        parts are not known are left out.
    """
    slices: dict[str, WeightSlice] = {}
    for path, module in source.named_modules():
        parts, twin = _linear_maps(module), _linear_maps(dict(target.named_modules()).get(path))
        if {MLP.up, MLP.down} <= parts.keys() & twin.keys() and _differ(parts, twin, MLP.up):
            slices.update(_prefixed(path, _neuron_slices(parts, twin[MLP.up].out_features)))
        if head_dim is not None and {*ATTENTION} <= parts.keys() & twin.keys():
            slices.update(_prefixed(path, _head_slices(parts, twin, head_dim)))
    return slices


def _linear_maps(module: nn.Module | None) -> dict[str, nn.Linear]:
    children = () if module is None else module.named_children()
    return {name: child for name, child in children if isinstance(child, nn.Linear)}


def _differ(parts: dict[str, nn.Linear], twin: dict[str, nn.Linear], name: str) -> bool:
    return parts[name].out_features != twin[name].out_features


def _neuron_slices(parts: dict[str, nn.Linear], count: int) -> dict[str, WeightSlice]:
    weight = _row_norms(parts[MLP.up]) * parts[MLP.down].weight.float().norm(dim=0)
    if MLP.gate in parts:
        weight = weight * _row_norms(parts[MLP.gate])
    rows = _largest(weight, count)
    return {name: WeightSlice(columns=rows) if name == MLP.down else WeightSlice(rows=rows) for name in parts if name in MLP}


def _head_slices(parts: dict[str, nn.Linear], twin: dict[str, nn.Linear], head_dim: int) -> dict[str, WeightSlice]:
    heads, groups = (_blocks(parts[name], head_dim) for name in (ATTENTION.query, ATTENTION.value))
    kept_heads, kept_groups = (_blocks(twin[name], head_dim) for name in (ATTENTION.query, ATTENTION.value))
    per_group, kept_per_group = heads // groups, kept_heads // kept_groups
    read = parts[ATTENTION.output].weight.float().unflatten(1, (-1, head_dim)).norm(dim=(0, 2))
    if kept_groups > groups or kept_per_group > per_group or read.numel() != heads:
        return {}
    read = read.view(groups, per_group)
    written = parts[ATTENTION.value].weight.float().unflatten(0, (groups, head_dim)).flatten(1).norm(dim=1)
    group_ids = _largest(written * read.norm(dim=1), kept_groups)
    head_ids = torch.cat([g * per_group + _largest(read[g], kept_per_group) for g in group_ids.tolist()])
    group_rows, head_rows = block_rows(group_ids, head_dim), block_rows(head_ids, head_dim)
    return {
        ATTENTION.query: WeightSlice(rows=head_rows),
        ATTENTION.key: WeightSlice(rows=group_rows),
        ATTENTION.value: WeightSlice(rows=group_rows),
        ATTENTION.output: WeightSlice(columns=head_rows),
    }


def _prefixed(path: str, slices: dict[str, WeightSlice]) -> dict[str, WeightSlice]:
    return {f"{path}.{name}" if path else name: part for name, part in slices.items()}


def _row_norms(linear: nn.Linear) -> Tensor:
    return linear.weight.float().norm(dim=1)


def _blocks(linear: nn.Linear, head_dim: int) -> int:
    return linear.out_features // head_dim


def _largest(weight: Tensor, count: int) -> Tensor:
    """Indices of the largest entries, ascending; all of them when `count` asks for more."""
    return weight.topk(min(count, weight.numel())).indices.sort().values


def block_rows(blocks: Tensor, size: int) -> Tensor:
    """Row indices of whole blocks of `size` rows."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
