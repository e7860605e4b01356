"""Reads texts with a class each, for classification.

    {"text": "Win a prize now", "label": "spam"}        labels are names, or indices from 0 on

The text is a column, or a template over the columns as in `templates`. Classes are named by the user, else by the dataset,
else by the labels of the training data themselves, sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from shadow_peft.training.examples import BadDataError
from shadow_peft.training.sources import load_rows
from shadow_peft.training.templates import Row, fill, require_columns


@dataclass(frozen=True)
class LabelledTexts:
    """Where a row has its text and its class.

    Args:
        template: the text as a template over the columns; None takes `text_column` as it is.
        text_column: column of the text.
        label_column: column of the class.
    """

    template: str | None = None
    text_column: str = "text"
    label_column: str = "label"

    def text_of(self, row: Row) -> str:
        """The text of a row.

        Raises:
            ValueError: the cell is null, empty, or no text.
        """
        text = row[self.text_column] if self.template is None else fill(self.template, row)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{self.text_column} must be a text, got {text!r}")
        return text


def load_labelled(
    data: str, columns: LabelledTexts, *, name: str | None = None, split: str = "train", classes: Sequence[str] | None = None
) -> tuple[Dataset, list[str]]:
    """The texts and class indices of a file, folder or dataset.

    Args:
        data: as in `sources.load_examples`.
        columns: where a row has its text and its class.
        name: configuration of the dataset.
        split: its split.
        classes: names of the classes; None takes those of the data.

    Returns:
        A dataset with `text` and `labels`, and the names of the classes.

    Raises:
        BadDataError: names a missing column, or lists every bad row with its number, counted from 1.
        OSError: the file does not exist.
    """
    rows = load_rows(data, name=name, split=split)
    if not len(rows):
        raise BadDataError([f"{data}: no examples"])
    require_columns(rows, [columns.template or f"{{{columns.text_column}}}", f"{{{columns.label_column}}}"], data)
    names = list(classes) if classes is not None else _names_of(rows, columns.label_column)
    texts: list[str] = []
    labels: list[int] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            texts.append(columns.text_of(row))
            labels.append(_index(row[columns.label_column], names))
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{data}: row {number}: {error}")
    if problems:
        raise BadDataError(problems)
    features = Features({"text": Value("string"), "labels": Value("int64")})
    return Dataset.from_dict({"text": texts, "labels": labels}, features=features), names


def _names_of(rows: Dataset, column: str) -> list[str]:
    """The classes of a dataset: those it declares, or the labels that occur, indices up to the largest."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = {_plain(label) for label in rows[column] if label is not None}
    if found and all(isinstance(label, int) for label in found):
        return [str(index) for index in range(max(found) + 1)]
    return sorted(map(str, found))


def _plain(label: Any) -> Any:
    """A truth value as its JSON text, and the integers of a column that an empty cell has made floats, as integers."""
    if isinstance(label, bool):
        return str(label).lower()
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _index(label: Any, names: Sequence[str]) -> int:
    """The index of a class that is given by name or by index.

    Raises:
        ValueError: it is no class.
    """
    label = _plain(label)
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise ValueError(f"the label {label!r} is no class among {', '.join(names)}")
