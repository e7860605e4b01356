"""Reads the rows that `shadow-peft cascade` calibrates on and scores."""

from __future__ import annotations

from typing import Any

from shadow_peft.cli.cascade_options import CascadeOptions
from shadow_peft.cli.errors import UserError


def read_texts(data: str, options: CascadeOptions) -> list[dict[str, Any]]:
    """Rows with `prompt` and `completion`, of data that `train` reads.

    Raises:
        UserError: they cannot be read, or have no references.
    """
    _require_datasets()
    from shadow_peft.training.sources import load_examples
    from shadow_peft.training.templates import PromptTemplate

    prompt, completion = (
        None if text is None else text.replace("\\n", "\n") for text in (options.prompt, options.completion)
    )
    try:
        template = PromptTemplate(prompt, completion, chat=options.chat and prompt is not None)
        rows = [dict(row) for row in load_examples(data, template)]
    except ValueError as error:
        raise UserError(str(error)) from error
    if "completion" not in rows[0]:
        raise UserError(f"{data}: rows of plain text have no right answer; give prompt and completion, or messages")
    return rows


def read_classes(data: str, options: CascadeOptions, names: list[str]) -> list[dict[str, Any]]:
    """Rows with a text as `prompt` and the name of its class as `completion`, of data that `train` reads.

    Raises:
        UserError: they cannot be read, or have other classes.
    """
    _require_datasets()
    from shadow_peft.training.labelled import LabelledTexts, load_labelled

    template = None if options.prompt is None else options.prompt.replace("\\n", "\n")
    columns = LabelledTexts(template, label_column=options.class_column or "label")
    try:
        rows, _ = load_labelled(data, columns, classes=names)
    except ValueError as error:
        raise UserError(str(error)) from error
    return [{"prompt": row["text"], "completion": names[row["labels"]]} for row in rows]


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; reading data needs the extra train: pip install 'shadow-peft[train]'") from error
