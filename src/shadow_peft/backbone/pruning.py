"""Which MLP neurons and attention heads of a base layer a narrower backbone keeps: those of largest weight norm.

    neuron j          |up[j]| * |down[:, j]|  (times |gate[j]| where there is a gate)
    key/value group   |v[group]| * |o[:, heads of group]|; in each kept group, the query heads of largest |o[:, head]|

Norms are Euclidean. What is kept stays in the order of the base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shadow_peft.base.architectures import ATTENTION, MLP


@dataclass(frozen=True)
class WeightSlice:
    """The rows (outputs) and columns (inputs) of one linear map that are kept; None keeps all."""

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
        target: a decoder layer of the narrower backbone.
        source: the base's decoder layer that it starts from, its weights in memory.
        head_dim: width of one attention head, the same in both; None where it is not declared.

    Returns:
        Path of each linear map inside the layer that must be pruned -> its slice. Maps of modules whose parts are not
        known are left out.
    """
    slices: dict[str, WeightSlice] = {}
    targets = dict(target.named_modules())
    for path, module in source.named_modules():
        wide, narrow = _linear_maps(module), _linear_maps(targets.get(path))
        common = wide.keys() & narrow.keys()
        if {MLP.up, MLP.down} <= common and wide[MLP.up].out_features != narrow[MLP.up].out_features:
            slices.update(_prefixed(path, _neuron_slices(wide, narrow[MLP.up].out_features)))
        if head_dim is not None and {*ATTENTION} <= common:
            slices.update(_prefixed(path, _head_slices(wide, narrow, head_dim)))
    return slices


def _linear_maps(module: nn.Module | None) -> dict[str, nn.Linear]:
    children = () if module is None else module.named_children()
    return {name: child for name, child in children if isinstance(child, nn.Linear)}


def _neuron_slices(wide: dict[str, nn.Linear], count: int) -> dict[str, WeightSlice]:
    score = _row_norms(wide[MLP.up]) * wide[MLP.down].weight.float().norm(dim=0)
    if MLP.gate in wide:
        score = score * _row_norms(wide[MLP.gate])
    neurons = _largest(score, count)
    inputs, outputs = WeightSlice(columns=neurons), WeightSlice(rows=neurons)
    return {name: inputs if name == MLP.down else outputs for name in wide if name in MLP}


def _head_slices(wide: dict[str, nn.Linear], narrow: dict[str, nn.Linear], head_dim: int) -> dict[str, WeightSlice]:
    heads, groups = (_blocks(wide[name], head_dim) for name in (ATTENTION.query, ATTENTION.value))
    kept_heads, kept_groups = (_blocks(narrow[name], head_dim) for name in (ATTENTION.query, ATTENTION.value))
    per_group, kept_per_group = heads // groups, kept_heads // kept_groups
    head_norms = wide[ATTENTION.output].weight.float().unflatten(1, (-1, head_dim)).norm(dim=(0, 2))
    if kept_groups > groups or kept_per_group > per_group or head_norms.numel() != heads:
        return {}
    head_norms = head_norms.view(groups, per_group)
    value_norms = wide[ATTENTION.value].weight.float().unflatten(0, (groups, head_dim)).flatten(1).norm(dim=1)
    group_ids = _largest(value_norms * head_norms.norm(dim=1), kept_groups)
    head_ids = torch.cat([g * per_group + _largest(head_norms[g], kept_per_group) for g in group_ids.tolist()])
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


def _largest(score: Tensor, count: int) -> Tensor:
    """Indices of the largest entries, ascending; all of them when `count` asks for more."""
    return score.topk(min(count, score.numel())).indices.sort().values


def block_rows(blocks: Tensor, size: int) -> Tensor:
    """Row indices of whole blocks of `size` rows."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
