"""A training while it runs: a bar with the losses on a terminal, a line for each entry of the log in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from shadow_peft.cli.screen import Row, Screen

#: Entry of a trainer's log -> what it is called here, and how it is written.
SHOWN: dict[str, tuple[str, str]] = {
    "loss": ("loss", "{:.4g}"),
    "base_loss": ("base+shadow", "{:.4g}"),
    "next_token_loss": ("next token", "{:.4g}"),
    "shadow_loss": ("shadow", "{:.4g}"),
    "distillation_loss": ("distillation", "{:.4g}"),
    "mean_token_accuracy": ("accuracy", "{:.1%}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "shadow_accuracy": ("of the shadow", "{:.1%}"),
    "learning_rate": ("lr", "{:.2g}"),
}


def in_words(log: Mapping[str, Any], prefix: str = "") -> str:
    """The figures of an entry of the log that are shown, in one line."""
    found = {key: log[f"{prefix}{key}"] for key in SHOWN if isinstance(log.get(f"{prefix}{key}"), (int, float))}
    return "  ".join(f"{SHOWN[key][0]} {SHOWN[key][1].format(value)}" for key, value in found.items())


def losses_in_words(log: Mapping[str, Any]) -> str:
    """The losses of an entry of the log: their sum alone where its parts are not known."""
    parts = {key: value for key, value in log.items() if key in ("base_loss", "shadow_loss", "distillation_loss")}
    return in_words(parts or {"loss": log.get("loss")})


class _Bars(Progress):
    """Bars that leave room for the ^C that a terminal echoes; it would begin a new line, and the bar would stay above."""

    def get_renderable(self) -> RenderableType:
        """The bars, two columns narrower than the terminal."""
        return _Narrower(super().get_renderable())


class _Narrower:
    def __init__(self, renderable: RenderableType) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.renderable, options.update(width=options.max_width - 2))


class TrainingProgress(TrainerCallback):
    """Shows the head of a run when the trainer knows it, then how far it is.

    Args:
        screen: where.
        head: what is known once the trainer has counted its steps, from their number.
        bars: a bar that moves, instead of lines.

    Attributes:
        step: optimizer steps that are done, in a resumed run those of its checkpoint included.
        steps: all of them.
        moved: whether this process has finished a step.
    """

    def __init__(self, screen: Screen, head: Callable[[int], Sequence[Row]], bars: bool) -> None:
        self.screen = screen
        self.bars = bars and screen.is_terminal
        self.step = self.steps = 0
        self.moved = self._ended = False
        self._head = head
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    # ---------------------------------------------------------------- what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The head, and the bar of the training."""
        self.step, self.steps = state.global_step, state.max_steps
        self.screen.panel("train", self._head(state.max_steps))
        if self.bars:
            self._training = self._bar("training", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        self.step, self.moved = state.global_step, True
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """The losses beside the bar, or in a line of their own; an evaluation has a line."""
        evaluated = in_words(logs or {}, "eval_")
        trained = "" if "train_loss" in (logs or {}) else in_words(logs or {})
        if evaluated and self._ended:
            return  # the last panel shows it
        if evaluated:
            total = "" if self.bars else f"/{state.max_steps}"  # which stands beside the bar
            self.screen.line(f"step {state.global_step}{total}  eval: {evaluated}")
        elif trained and self._progress is not None and self._training is not None:
            self._progress.update(self._training, said=losses_in_words(logs))
        elif trained:
            self.screen.line(f"step {state.global_step}/{state.max_steps}  {trained}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """One batch of the evaluation further."""
        if not self.bars or eval_dataloader is None:
            return
        if self._evaluation is None:
            self._evaluation = self._bar("evaluation", len(eval_dataloader), 0)
        if self._progress is not None:
            self._progress.advance(self._evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar of the evaluation goes."""
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
        self._evaluation = None
        if self._training is None:
            self.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar of the training stays as it is."""
        self._ended = True
        self.close()

    # ---------------------------------------------------------------- bars

    def close(self) -> None:
        """Leave the screen to others; whatever ended the training, its bar may be closed."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._evaluation = None

    def _bar(self, name: str, total: int, done: int) -> TaskID:
        if self._progress is None:
            self._progress = _Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),  # what the others leave
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
                console=self.screen.console,
                expand=True,
            )
            self._progress.start()
        return self._progress.add_task(name, total=total, completed=done, said="")
