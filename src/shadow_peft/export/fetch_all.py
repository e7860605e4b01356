"""A program: fetches what exports to GGUF and to a page take from PyPI and npm, so that they need no network later.

python -m shadow_peft.export.fetch_all
"""

from __future__ import annotations

from shadow_peft.export.fetched import fetch
from shadow_peft.export.gguf import SOURCES
from shadow_peft.export.html import packages


def main() -> None:
    """Fetch every package, and say where it is."""
    for package in (SOURCES, *packages().values()):
        print(fetch(package))


if __name__ == "__main__":
    main()
