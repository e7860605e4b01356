"""Parts of a page of the documentation that a benchmark writes."""

from __future__ import annotations

import argparse
from pathlib import Path


def put_between(page: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        ValueError: the page does not have both marks once.
    """
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"{page} must have {begin!r} and {end!r} once each.")
    before, rest = whole.split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def report_options(description: str | None, results: Path, page: Path, picture: Path) -> argparse.Namespace:
    """The command line of a report: `print`, `results`, `page` and `picture`, which default to what is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="Print the tables and write nothing.")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--page", type=Path, default=page, help="A page with the two marks.")
    parser.add_argument("--picture", type=Path, default=picture)
    return parser.parse_args()
