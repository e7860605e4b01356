"""Tiny datasets with the ids, configurations, splits and columns of those that the recipes name, as local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

Splits = dict[str, Dataset]

GROUPS = ["alt.atheism", "comp.graphics", "sci.space"]


def _gsm8k(count: int) -> Dataset:
    return Dataset.from_list(
        [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(count)]
    )


def _mmlu(count: int) -> Dataset:
    rows = [{"question": f"Pick {i % 4}", "subject": "", "choices": ["zero", "one", "two", "three"], "answer": i % 4}
            for i in range(count)]  # fmt: skip
    letters = ClassLabel(names=["A", "B", "C", "D"])
    return Dataset.from_list(rows).cast_column("answer", letters)


def _squad(count: int) -> Dataset:
    answers = [
        {"text": ["Normandy"], "answer_start": [3]} if i % 2 == 0 else {"text": [], "answer_start": []} for i in range(count)
    ]
    row = {"id": "0", "title": "Normans", "context": "In Normandy they lived.", "question": "Where did they live?"}
    return Dataset.from_list([{**row, "answers": answer} for answer in answers])


def _amazon(count: int) -> Dataset:
    return Dataset.from_list(
        [{"id": str(i), "text": f"Broke on day {i}.", "label": i % 5, "label_text": str(i % 5)} for i in range(count)]
    )


def _newsgroups(count: int) -> Dataset:
    rows = [{"text": f"About {GROUPS[i % 3]}", "label": i % 3, "label_text": GROUPS[i % 3]} for i in range(count)]
    return Dataset.from_list(rows, features=Features(text=Value("string"), label=Value("int64"), label_text=Value("string")))


def _conversations(count: int) -> Dataset:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to you"}]
    return Dataset.from_list(
        [{"prompt": "hi", "prompt_id": str(i), "messages": turns, "category": "Chat"} for i in range(count)]
    )


STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai/gsm8k": ("main", {"train": _gsm8k, "test": _gsm8k}),
    "cais/mmlu": ("all", {"auxiliary_train": _mmlu, "validation": _mmlu}),
    "rajpurkar/squad_v2": ("squad_v2", {"train": _squad, "validation": _squad}),
    "SetFit/amazon_reviews_multi_en": ("default", {"train": _amazon, "validation": _amazon, "test": _amazon}),
    "SetFit/20_newsgroups": ("default", {"train": _newsgroups, "test": _newsgroups}),
    "HuggingFaceH4/no_robots": ("default", {"train": _conversations}),
}


def stand_in(repository: str, directory: Path, rows: int = 12) -> Path:
    """A folder that `datasets.load_dataset` reads as it would read the hub's repository."""
    config, splits = STAND_INS[repository]
    folder = directory / repository.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split, make in splits.items():
        make(rows).to_parquet(folder / f"{split}.parquet")
        files.append(f"  - split: {split}\n    path: {split}.parquet\n")
    header = f"configs:\n- config_name: {config}\n  default: true\n  data_files:\n{''.join(files)}"
    (folder / "README.md").write_text(f"---\n{header}---\n", encoding="utf-8")
    return folder
