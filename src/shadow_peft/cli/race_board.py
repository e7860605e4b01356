"""A race while it runs: one table that moves on a terminal, a line for every tenth in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from types import TracebackType

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shadow_peft.cli.screen import Screen
from shadow_peft.demo.race import DETACHED_NAME, SHADOW_NAME, Progress

BAR_WIDTH = 16


class RaceBoard:
    """How far the contenders are; `show` may be called from several threads.

    Args:
        screen: where.
        trained: the names of the contenders that are trained.
        tested: the names of all, in the order of the table.
    """

    def __init__(self, screen: Screen, trained: Sequence[str], tested: Sequence[str]) -> None:
        self._screen = screen
        self._trained = trained
        self._tested = tested
        self._latest: dict[tuple[str, str], Progress] = {}
        self._lock = Lock()
        self._live = Live(self._table(), console=screen.console, auto_refresh=False) if screen.is_terminal else None

    def __enter__(self) -> RaceBoard:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """The table with what a contender says, or a line when another tenth of its work is done."""
        with self._lock:
            before = self._latest.get((progress.contender, progress.work))
            self._latest[progress.contender, progress.work] = progress
            if self._live is not None:
                self._live.update(self._table(), refresh=True)
            elif before is None or _tenth(before) < _tenth(progress):
                self._screen.line(in_words(progress))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("", "training", "steps", "loss", "test", "commands"):
            table.add_column(heading, justify="right" if heading in ("steps", "loss", "commands") else "left", no_wrap=True)
        for name in self._tested:
            training, test = self._latest.get((name, "training")), self._latest.get((name, "test"))
            waits = name in self._trained
            table.add_row(Text(name), *_lane(training, waits), Text(self._loss(name)), *_lane(test, True))
        return table

    def _loss(self, name: str) -> str:
        """The last training loss of a contender; the detached shadow is trained with the base."""
        of, key = (SHADOW_NAME, "detached") if name == DETACHED_NAME else (name, "loss")
        progress = self._latest.get((of, "training"))
        return "" if progress is None or key not in progress.losses else f"{progress.losses[key]:.3f}"


def in_words(progress: Progress) -> str:
    """A line about a contender's progress."""
    if progress.work == "test":
        said = f"answered {progress.done}/{progress.total} test commands"
    else:
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in progress.losses.items())
        said = f"step {progress.done}/{progress.total}  {losses}"
    return f"{progress.contender:<15}  {said}"


def _lane(progress: Progress | None, waits: bool) -> tuple[RenderableType, Text]:
    """A bar and its figures; an empty bar before the work begins, nothing where there is none."""
    if progress is None:
        return (ProgressBar(total=1, completed=0, width=BAR_WIDTH) if waits else Text("")), Text("")
    bar = ProgressBar(total=progress.total, completed=progress.done, width=BAR_WIDTH, complete_style="cyan")
    return bar, Text(f"{progress.done}/{progress.total}")


def _tenth(progress: Progress) -> int:
    return 10 * progress.done // progress.total
