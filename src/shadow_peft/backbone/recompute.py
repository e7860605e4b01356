"""Selective checkpointing of the backbone: in training it keeps its matrix products and recomputes everything else.

Norms, activations, gating and attention are cheap beside the linear layers and hold more than half of what autograd would
save. It does not apply to layers that are recomputed anyway (gradient checkpointing), nor to compiled graphs, where the
compiler decides what is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_MATMULS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})


def checkpoint_except_matmuls(
    function: Callable[..., Any], inputs: dict[str, Tensor], arguments: dict[str, Any], save_matmuls: bool = True
) -> Any:
    """`function(**inputs, **arguments)`, saving the outputs of its matrix products for the backward pass and nothing else.

    Args:
        function: the backbone.
        inputs: the tensors that it reads; it gets copies, since some models modify their embeddings in place.
        arguments: its other arguments.
        save_matmuls: False saves nothing at all, for a backbone that modifies these outputs in place.
    """

    def run(*tensors: Tensor) -> Any:
        return function(**{name: t.clone() for name, t in zip(inputs, tensors, strict=True)}, **arguments)

    selection: dict[str, Any] = {}
    if save_matmuls:
        selection["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(run, *inputs.values(), use_reentrant=False, **selection)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _MATMULS else CheckpointPolicy.PREFER_RECOMPUTE
