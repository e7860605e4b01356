"""What options of several verbs share: the range of a number, and dtypes; needs no torch."""

from __future__ import annotations

import math
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

LARGEST_SEED = 2**32 - 1


def require(name: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Refuse a number outside a range; None, which stands for what was not given, lies in every range.

    Raises:
        ValueError: naming the option, the range and the number.
    """
    if value is None or (least <= value <= most and value != math.inf):
        return
    limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
    raise ValueError(f"--{name} must be {limits}, got {value}")
