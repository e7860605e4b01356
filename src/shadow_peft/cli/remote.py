"""The remote model that options name."""

from __future__ import annotations

import os

from shadow_peft.cascade.remote import RemoteModel
from shadow_peft.cli.errors import UserError

API_KEY = "SHADOW_PEFT_API_KEY"
"""Variable of the environment with the key for --remote_url."""


def remote_model(url: str | None, name: str | None, timeout: float) -> RemoteModel | None:
    """The model behind an endpoint; None where none is named.

    Raises:
        UserError: the package that asks it is not installed.
    """
    if url is None or name is None:
        return None
    try:
        return RemoteModel(name, url, api_key=os.environ.get(API_KEY), timeout=timeout)
    except ImportError as error:
        raise UserError(f"{error}; a remote model needs the extra: pip install 'shadow-peft[cascade]'") from error
