"""A corpus as a stream of blocks of tokens, in an order that a seed decides; it need not fit into memory.

Documents of several files are mixed in proportion to the files' sizes, shuffled within a buffer, parted by the tokenizer's
end-of-text token and packed into blocks of equal length, across the ends of documents. The first blocks are held out for
evaluation; the others are numbered, and repeated in the same order for as long as the training lasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import IterableDataset, interleave_datasets, load_dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

READERS: dict[str, dict[str, Any]] = {
    ".jsonl": {"path": "json"},
    ".json": {"path": "json"},
    ".csv": {"path": "csv"},
    ".parquet": {"path": "parquet"},
    ".txt": {"path": "text", "sample_by": "paragraph"},
}
"""Suffix of a file -> how `datasets` reads it."""


@dataclass(frozen=True)
class Corpus:
    """Where the text is, and how it becomes blocks.

    Attributes:
        places: files, folders of files, or the id of one dataset on the hub.
        context: tokens of a block.
        held_out: blocks for evaluation.
        seed: of the order.
        buffer: documents among which the next one is drawn.
        column: column of the text.
        name: configuration of a dataset on the hub.
        split: its split.

    Raises:
        ValueError: a number is too small.
    """

    places: tuple[str, ...]
    context: int = 512
    held_out: int = 64
    seed: int = 0
    buffer: int = 2000
    column: str = "text"
    name: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("held_out", 1), ("buffer", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


def open_corpus(corpus: Corpus) -> IterableDataset:
    """The documents in their order, one column `text`; nothing is read yet but the first of each file.

    Raises:
        FileNotFoundError: a file is not there, or a folder holds no file that can be read.
        ValueError: a file of another kind, or without the column.
    """
    found = {place: files_of(place) for place in corpus.places}
    files = [file for place in corpus.places for file in found[place]]
    if files:
        missing = [place for place, those in found.items() if not those]
        if missing:
            raise FileNotFoundError(f"There is no {missing[0]}; a dataset of the hub is read alone, not beside files.")
        parts = [load_dataset(**READERS[f.suffix], data_files=str(f), split="train", streaming=True) for f in files]
    else:
        parts = [load_dataset(p, corpus.name, split=corpus.split, streaming=True) for p in corpus.places]
    texts = [_texts(part, corpus.column) for part in parts]
    if len(texts) == 1:
        return texts[0].shuffle(seed=corpus.seed, buffer_size=corpus.buffer)
    sizes = [file.stat().st_size for file in files] or [1] * len(texts)
    mixed = interleave_datasets(
        texts,
        probabilities=[size / sum(sizes) for size in sizes],
        seed=corpus.seed,
        stopping_strategy="all_exhausted_without_replacement",
    )
    return mixed.shuffle(seed=corpus.seed, buffer_size=corpus.buffer)


def blocks(documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, context: int) -> IterableDataset:
    """Blocks `input_ids` `[context]` of a stream of documents.

    Documents are packed a thousand at a time; what is left over of a thousand is dropped.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token, by which documents are parted.")
    tokens = documents.map(partial(_tokenized, tokenizer=tokenizer), batched=True, remove_columns=["text"])
    packed = pack_dataset(tokens, context, strategy="wrapped")
    return packed.filter(partial(_is_full, context=context))


def split_blocks(stream: IterableDataset, held_out: int) -> tuple[IterableDataset, list[dict[str, Any]]]:
    """The stream of the training, whose blocks are numbered in a column `index`, and the blocks that are held out from it.

    Raises:
        ValueError: the corpus has no more blocks than are held out.
    """
    first = list(stream.take(held_out + 1))
    if len(first) <= held_out:
        raise ValueError(
            f"The corpus has {len(first)} blocks, of which {held_out} are to be held out, so none is left to train on: "
            "give more text, a shorter context, or hold out less."
        )
    return stream.skip(held_out).map(_numbered, with_indices=True), first[:held_out]


def files_of(place: str) -> list[Path]:
    """The files that a place names, sorted; none where it can only be the id of a dataset.

    Raises:
        FileNotFoundError: a file is not there, or a folder holds no file that can be read.
        ValueError: a file of another kind.
    """
    path = Path(place)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
        if not found:
            raise FileNotFoundError(f"{place} holds no file that ends in {', '.join(READERS)}")
        return found
    if path.is_file() and path.suffix not in READERS:
        raise ValueError(f"{place}: files end in {', '.join(READERS)}, got {path.suffix or 'no suffix'}")
    if path.suffix in READERS and not path.is_file():
        raise FileNotFoundError(f"there is no file {place}")
    return [path] if path.is_file() else []


def _texts(part: IterableDataset, column: str) -> IterableDataset:
    first = next(iter(part), None)
    if first is None or not isinstance(first.get(column), str):
        raise ValueError(
            f"the corpus has no text in a column {column!r}; its columns are {', '.join(first or {}) or 'none'}"
        )
    chosen = part.select_columns([column])
    return chosen if column == "text" else chosen.rename_column(column, "text")


def _tokenized(rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    ids = tokenizer(rows["text"], verbose=False, return_attention_mask=False)["input_ids"]
    end = tokenizer.eos_token_id
    return {"input_ids": [row if row and row[-1] == end else [*row, end] for row in ids]}


def _numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, "index": index}


def _is_full(row: dict[str, list[int]], context: int) -> bool:
    return len(row["input_ids"]) == context
