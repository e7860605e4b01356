"""A quiet transformers on one thread, for every test."""

from __future__ import annotations

import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> None:
    """Neither progress bars nor notes."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
