"""Parts of a page of the documentation that a benchmark writes."""

from __future__ import annotations

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
