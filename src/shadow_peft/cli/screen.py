"""What a verb says of its work: panels, bars and colour on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Row = tuple[str, str]
"""What something is called, and what it is; an empty name goes on with the row above."""


class Screen:
    """Standard output.

    Args:
        silent: say nothing, as all processes of a run but the first do.
    """

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(quiet=silent, highlight=False, markup=False, emoji=False)

    @property
    def is_terminal(self) -> bool:
        """Whether somebody looks on: no pipe, no file."""
        return self.console.is_terminal and not self.console.quiet

    def line(self, text: str, style: str = "") -> None:
        """A line, which is not broken where the screen ends: what is copied from it stays whole."""
        self.console.print(Text(text, style), soft_wrap=True)

    def panel(self, title: str, rows: Sequence[Row]) -> None:
        """Names and values, in a frame on a terminal."""
        width = max(len(name) for name, _ in rows)
        if not self.is_terminal:
            self.line(f"{title}:")
            for name, value in rows:
                self.line(f"  {name:<{width}}  {value}")
            return
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(name, "cyan"), Text(value))
        self.console.print(Panel(table, title=Text(title, "bold"), title_align="left", expand=False, border_style="cyan"))

    def command(self, purpose: str, command: str) -> None:
        """A command to type next."""
        self.line(f"{purpose}:")
        self.line(f"  {command}", "bold")

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A spinner for as long as something takes; nothing in a pipe."""
        if not self.is_terminal:
            yield
            return
        with self.console.status(Text(text)):
            yield
