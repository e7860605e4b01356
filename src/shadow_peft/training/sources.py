"""Loads examples from a local file, a local folder or a dataset of the hub, as one `datasets.Dataset`."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from shadow_peft.training.examples import BadDataError, kind_of, last_turn_as_completion, read_examples
from shadow_peft.training.templates import PromptTemplate, formatted

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffix of a local file -> the builder of `datasets` that reads it."""

_ON_DISK = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` of `datasets` leaves in a folder."""


def load_examples(
    data: str, template: PromptTemplate, *, name: str | None = None, split: str = "train", text_column: str = "text"
) -> Dataset:
    """The checked examples of a file, folder or dataset, with the columns that a trainer reads.

    Args:
        data: a file (`.jsonl`, `.json`, `.csv`, `.parquet`), a folder of data files or one that `save_to_disk` made, or the
            id of a dataset on the hub.
        template: how rows become prompts and completions, see `templates`.
        name: configuration of the dataset, such as `main`.
        split: its split, slices such as `train[:90%]` included; a file is one split, `train`.
        text_column: column of plain text.

    Returns:
        A dataset with `prompt` and `completion`, or with `text`.

    Raises:
        BadDataError: lists every bad line or row, or says what cannot be loaded.
        OSError: the file does not exist.
    """
    if Path(data).suffix == ".jsonl" and not template.has_templates and split == "train" and text_column == "text":
        examples = read_examples(data)
        return Dataset.from_list([last_turn_as_completion(e) if kind_of(e) == "messages" else e for e in examples])
    return formatted(load_rows(data, name=name, split=split), template, data, text_column)


def load_rows(data: str, *, name: str | None = None, split: str = "train") -> Dataset:
    """The rows of a file, folder or dataset with all columns; the arguments are those of `load_examples`."""
    path = Path(data)
    if path.suffix in READERS and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {data}")
        if path.stat().st_size == 0:
            raise BadDataError([f"{data}: no examples, the file is empty"])
        return _loaded(data, READERS[path.suffix], data_files=str(path), split=split)
    if path.is_file():
        raise BadDataError([f"{data}: files end in {', '.join(READERS)}, got {path.suffix or 'no suffix'}"])
    if any((path / marker).is_file() for marker in _ON_DISK):
        return _from_disk(data, split)
    return _loaded(data, data, name=name, split=split)


def _loaded(data: str, *args: str, **kwargs: str | None) -> Dataset:
    try:
        rows = load_dataset(*args, **kwargs)
    except (DatasetsError, OSError, ValueError, TypeError, LookupError, StopIteration) as error:
        said = str(_innermost(error))
        has_rows = said and "corresponds to no data" not in said  # what `datasets` says of a table with a header alone
        raise BadDataError([f"{data}: {said if has_rows else 'no examples'}"]) from error
    assert isinstance(rows, Dataset)  # a split was named
    return rows


def _from_disk(data: str, split: str) -> Dataset:
    rows = load_from_disk(data)
    if isinstance(rows, Dataset):
        if split != "train":
            raise BadDataError([f"{data}: a saved dataset without splits has no {split!r}; save it with its splits"])
        return rows
    if split not in rows:
        raise BadDataError([f"{data}: there is no split {split!r}; it has {', '.join(rows)}"])
    return rows[split]


def _innermost(error: BaseException) -> BaseException:
    """The first exception of a chain; `datasets` wraps the reader's own message."""
    return _innermost(error.__cause__) if error.__cause__ is not None else error
