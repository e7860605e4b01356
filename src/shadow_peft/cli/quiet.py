"""Libraries beneath the command line: no bars of loading and preprocessing, and a warning is one line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from shadow_peft.cli.errors import one_line


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it, transformers and datasets show no bars, and warnings are lines on standard error without source code.

    The bars of downloads stay: they are huggingface_hub's.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it can do without
    datasets = sys.modules.get("datasets")  # not for a verb that works without it
    had_bars = datasets is not None and datasets.are_progress_bars_disabled() is False
    hook = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    if datasets is not None:
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # asked by peft
            warnings.showwarning = _one_line
            yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        if datasets is not None and had_bars:
            datasets.enable_progress_bars()


@contextmanager
def no_reports() -> Iterator[None]:
    """Within it, transformers logs errors alone: its caller looks at what was loaded itself."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    text = one_line(message) if isinstance(message, Warning) else str(message)
    print(f"note: {text}", file=sys.stderr)
