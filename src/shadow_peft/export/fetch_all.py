"""A program: fetches what exports to GGUF and to a page take from PyPI and npm, so that they need no network later.

python -m shadow_peft.export.fetch_all
"""

from __future__ import annotations

import sys

from shadow_peft.export.fetched import fetch
from shadow_peft.export.gguf import LIBRARY, SOURCES
from shadow_peft.export.html import packages
from shadow_peft.export.runtimes import CannotExport


def main() -> int:
    """Fetch every package and say where it is; 1 where one cannot be fetched."""
    try:
        for package in (SOURCES, LIBRARY, *packages().values()):
            print(fetch(package))
    except CannotExport as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
