"""The backbone in training keeps what its matrix products gave and computes the rest again in the backward pass.

Norms, activations, gating and attention are cheap beside the linear maps and hold more than half of what autograd would
keep. Chance is drawn again as it was. It is not for layers that are computed again anyway (gradient checkpointing), nor for
compiled graphs, where the compiler decides what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})


def checkpoint_except_matmuls(
    function: Callable[..., Any], inputs: dict[str, Tensor], arguments: dict[str, Any], products: bool = True
) -> Any:
    """`function(**inputs, **arguments)`, of which the backward pass finds the matrix products and no other values.

    Args:
        function: the backbone.
        inputs: the tensors that it reads; it gets copies, since some models change their embeddings in place.
        arguments: whatever else it takes.
        products: False keeps nothing at all, for a backbone that changes its products in place.
    """

    def run(*tensors: Tensor) -> Any:
        return function(**{name: t.clone() for name, t in zip(inputs, tensors, strict=True)}, **arguments)

    selection: dict[str, Any] = {}
    if products:
        selection["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(run, *inputs.values(), use_reentrant=False, **selection)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
