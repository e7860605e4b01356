"""Casts of parameters, made once where many passes read the same weights.

Beside a base in half precision every pass casts the float32 masters of an adapter. A generation is many passes over weights
that do not change: inside `cast_once()`, in its thread, a cast is made once for every parameter, device and dtype, and again
when the parameter has changed: another tensor in its place, another storage, or another version, which every operation in
place counts (a change through `.data` is not counted). The copies go with the outermost context.

With gradients, in compiled graphs, and of tensors that know no version, a cast is an ordinary one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_thread = threading.local()


@contextmanager
def cast_once() -> Iterator[None]:
    """Inside the context, in this thread, `cast` and `derived` make what they make once."""
    outer: dict[Any, Any] | None = getattr(_thread, "made", None)
    _thread.made = {} if outer is None else outer
    try:
        yield
    finally:
        _thread.made = outer


def cast(parameter: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The parameter in a dtype, and on a device if one is given; itself where it is so already."""
    device = parameter.device if device is None else device
    if parameter.dtype == dtype and parameter.device == device:
        return parameter
    made: Tensor = derived(("cast", dtype, device), [parameter], lambda: parameter.to(device, dtype))
    return made


def cast_pairs(downs: Tensor, ups: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The pairs of two stacks of weights `[N, ...]` in a dtype, one a layer."""

    def make() -> list[tuple[Tensor, Tensor]]:
        return list(zip(cast(downs, dtype).unbind(0), cast(ups, dtype).unbind(0), strict=True))

    pairs: list[tuple[Tensor, Tensor]] = derived(("pairs", dtype), [downs, ups], make)
    return pairs


def derived(key: Any, parameters: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """What `make` makes of parameters; inside `cast_once()` what it made before, if none of them has changed.

    Args:
        key: tells apart what is made of the same parameters.
        parameters: all that it is made of.
        make: makes it.
    """
    if not casts_once() or not all(_knows_version(p) for p in parameters):
        return make()
    made: dict[Any, Any] = _thread.made
    place = key, tuple(map(id, parameters))
    now = [(p, p._version, p.data_ptr()) for p in parameters]
    if place in made:
        before, result = made[place]
        if all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, now, strict=True)):
            return result
    result = make()
    made[place] = now, result
    return result


def casts_once() -> bool:
    """Whether casts are made once here and now."""
    inside = getattr(_thread, "made", None) is not None
    return inside and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _knows_version(parameter: Tensor) -> bool:
    return type(parameter) in (nn.Parameter, Tensor) and not parameter.is_inference()
