"""Turns rows with any columns into prompts and completions, by template strings over the columns.

    prompt:      "Question: {question}\\nAnswer:"
    completion:  " {answer}"                            {choices[0]} of a list, {answers[text][0]} inside a struct

Class labels of a dataset are replaced by their names; a null cell is an error. Without templates, rows must have columns
that are used as they are: `prompt` and `completion`, `messages`, `conversations`, or `text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from datasets import ClassLabel, Dataset

from shadow_peft.training.examples import BadDataError, Example, checked, last_turn_as_completion

Row = dict[str, Any]


class NullCellError(ValueError):
    """A template asks for a cell that is null."""


class _RowFormatter(Formatter):
    """`str.format`, but for null cells, which would become the word None."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value of a field, and its first name.

        Raises:
            NullCellError: the value is null.
        """
        value, name = super().get_field(field_name, args, kwargs)
        if value is None:
            raise NullCellError(f"column {field_name} is null")
        return value, name


_FORMATTER = _RowFormatter()


def fill(template: str, row: Row) -> str:
    """A template filled with one row.

    Raises:
        ValueError, IndexError, KeyError, TypeError, AttributeError: it does not fit the row, or a cell is null.
    """
    return _FORMATTER.vformat(template, (), row)


@dataclass(frozen=True)
class PromptTemplate:
    """How a row becomes a prompt and a completion.

    Args:
        prompt: template of the prompt; None uses the columns as they are.
        completion: template of the completion.
        completion_if_missing: the completion where the template reads a null cell or an entry of an empty list.
        class_column: a column of class indices to be replaced by `class_names`.
        class_names: name of each class.
        chat: make prompt and completion a user's and an assistant's turn, for the chat template.

    Raises:
        ValueError: one template without the other, or names without a column.
    """

    prompt: str | None = None
    completion: str | None = None
    completion_if_missing: str | None = None
    class_column: str | None = None
    class_names: list[str] | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion are templates of one example: give both or neither")
        if (self.class_column is None) != (self.class_names is None):
            raise ValueError("class_column and class_names go together: give both or neither")
        if not self.has_templates and (self.chat or self.class_names or self.completion_if_missing is not None):
            raise ValueError("chat, class_names and completion_if_missing belong to the templates prompt and completion")

    @property
    def has_templates(self) -> bool:
        """Whether prompt and completion are built from columns."""
        return self.prompt is not None


def formatted(rows: Dataset, template: PromptTemplate, where: str, text_column: str = "text") -> Dataset:
    """The rows with the columns that a trainer reads.

    Args:
        rows: any columns.
        template: how a row becomes a prompt and a completion.
        where: name of the data for errors.
        text_column: column of plain text, where rows are neither prompts and completions nor conversations.

    Returns:
        A dataset with `prompt` and `completion`, or with `text`.

    Raises:
        BadDataError: names a missing column, or lists every bad row with its number, counted from 1.
    """
    if template.has_templates:
        require_columns(rows, [str(template.prompt), str(template.completion), *_class_column(template)], where)
        return _mapped(_named_classes(rows, template, where), template, where)
    columns = set(rows.column_names)
    if {"prompt", "completion"} <= columns or columns & {"messages", "conversations"}:
        return _mapped(rows, template, where)
    if text_column in columns:
        return _mapped(rows.select_columns([text_column]).rename_columns({text_column: "text"}), template, where)
    known = f"prompt and completion, messages, conversations or {text_column}"
    raise BadDataError([f"{where}: no columns {known} among {', '.join(rows.column_names) or 'none'}; give templates"])


def _mapped(rows: Dataset, template: PromptTemplate, where: str) -> Dataset:
    problems: list[str] = []
    if not len(rows):
        raise BadDataError([f"{where}: no examples"])

    def convert(row: Row, index: int) -> Example:
        try:
            return _filled(row, template) if template.has_templates else _as_it_is(row)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{where}: row {index + 1}: {_error_text(error)}")
            return {"text": None} if rows.column_names == ["text"] else {"prompt": None, "completion": None}

    try:
        examples = rows.map(
            convert, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False, desc=f"Reading {where}"
        )
    finally:
        if problems:  # whatever else the nulls in their place have led to
            raise BadDataError(problems)
    return examples


def _as_it_is(row: Row) -> Example:
    example = checked(row)
    return last_turn_as_completion(example) if "messages" in example else example


def _filled(row: Row, template: PromptTemplate) -> Example:
    """Fill both templates with one row."""
    assert template.prompt is not None
    assert template.completion is not None
    prompt = fill(template.prompt, row)
    try:
        completion = fill(template.completion, row)
    except (IndexError, NullCellError):
        if template.completion_if_missing is None:
            raise
        completion = template.completion_if_missing
    example = checked({"prompt": prompt, "completion": completion})
    return _as_turns(example) if template.chat else example


def _as_turns(example: Example) -> Example:
    prompt = [{"role": "user", "content": example["prompt"]}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": example["completion"]}]}


def require_columns(rows: Dataset, templates: Sequence[str], where: str) -> None:
    """Refuse rows that lack a column which one of the templates reads.

    Raises:
        BadDataError: names the missing columns.
    """
    missing = sorted({name for template in templates for name in _columns_of(template)} - set(rows.column_names))
    if missing:
        raise BadDataError([f"{where}: no column {', '.join(missing)}; it has {', '.join(rows.column_names)}"])


def _class_column(template: PromptTemplate) -> list[str]:
    return [f"{{{template.class_column}}}"] if template.class_column else []


def _columns_of(template: str) -> set[str]:
    """The columns that a template reads: `choices` of `{choices[0]}`."""
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise BadDataError([f"the template {template!r} is not well formed: {error}"]) from error
    return {name.split("[")[0].split(".")[0] for name in fields}


def _named_classes(rows: Dataset, template: PromptTemplate, where: str) -> Dataset:
    """The rows with class names instead of class indices."""
    read = _columns_of(template.prompt or "") | _columns_of(template.completion or "")
    names = {c: feature.names for c, feature in rows.features.items() if isinstance(feature, ClassLabel) and c in read}
    if template.class_column is not None and template.class_names is not None:
        names[template.class_column] = template.class_names
    for column, chosen in names.items():
        rows = _with_names(rows, column, chosen, where)
    return rows


def _with_names(rows: Dataset, column: str, names: list[str], where: str) -> Dataset:
    indices = rows[column]
    wrong = [f"{where}: row {i + 1}: {column} {v!r} is no index of {len(names)} names" for i, v in enumerate(indices)
             if not (isinstance(v, int) and 0 <= v < len(names))]  # fmt: skip
    if wrong:
        raise BadDataError(wrong)
    return rows.remove_columns(column).add_column(column, [names[index] for index in indices])


def _error_text(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    return f"the template does not fit: {type(error).__name__}: {error}"
