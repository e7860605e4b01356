"""The tasks on the real base, each dealt to train, dev and test by whole sources, and their rows of tokens.

    commands    a command to a home -> intent and slots as one line of JSON    `commands`
    headlines   headline -> satirical or not, by a classification head         `texts`
    quartz      question with two answers -> letter                            `texts`
    mails       mail -> spam or not, by a classification head                  `texts`
    robot       the demo's commands -> one line of JSON                        `shadow_peft.demo.robot_commands`

Everything is decided by seeds and by the hashes of the packages. The text is written once, so that the environments of the
published packages read the same: python -m benchmarks.quality.real.tasks
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality.real.packages import cache, made
from benchmarks.quality.training import IGNORE, Row

CLASSIFICATION = ("headlines", "mails")
DRAFTED = ("commands", "robot")
"""Tasks on which decoding is timed: their completions are longer than a token, so that there is something to draft."""
SIZES = {"train": 800, "dev": 128, "test": 160}
LONGEST = 128
FORGETTING_PASSAGES, FORGETTING_TOKENS = 24, 128


def robot(sizes: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """The demo's commands."""
    from shadow_peft.demo.robot_commands import commands

    return {split: [command.row() for command in commands(split, size)] for split, size in sizes.items()}  # type: ignore[arg-type]


def makers() -> dict[str, Callable[[dict[str, int]], Any]]:
    """What makes each task's splits of the sizes that are asked for."""
    from benchmarks.quality.real import commands, texts

    return {
        "commands": commands.commands_task, "headlines": texts.headlines, "quartz": texts.quartz, "mails": texts.mails,
        "robot": robot,
    }  # fmt: skip


TASKS = ("commands", "headlines", "quartz", "mails", "robot")


def splits(task: str) -> dict[str, list[dict[str, Any]]]:
    """The examples of a task: `prompt`, and `completion` or `label`; made and written if they are missing."""
    return json.loads(_written(task, lambda: makers()[task](SIZES)).read_text(encoding="utf-8"))


def passages() -> list[str]:
    """The passages of Wikipedia on which forgetting is measured."""
    from benchmarks.quality.real.texts import wikipedia

    path = _written("wikipedia", lambda: wikipedia(FORGETTING_PASSAGES))
    return json.loads(path.read_text(encoding="utf-8"))


def _written(name: str, make: Callable[[], Any]) -> Path:
    def write(folder: Path) -> None:
        content = json.dumps(make(), indent=0, ensure_ascii=False)
        (folder / "content.json").write_text(content + "\n", encoding="utf-8")

    return made(cache() / "tasks" / name, write) / "content.json"


def encode(example: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokens of an example; labels `[T]` for all but the prompt, or one class. Prompts are cut to their last `LONGEST`."""
    prompt = tokenizer(example["prompt"])["input_ids"][-LONGEST:]
    if "label" in example:
        return {"input_ids": prompt, "labels": example["label"]}
    completion = [*tokenizer(example["completion"])["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [IGNORE] * len(prompt) + completion}


def passage_rows(tokenizer: Any) -> list[Row]:
    """The first tokens of every passage, each of them a target."""
    blocks = [tokenizer(text)["input_ids"][:FORGETTING_TOKENS] for text in passages()]
    return [{"input_ids": block, "labels": block} for block in blocks]


def main() -> None:
    for task in sys.argv[1:] or (*TASKS, "wikipedia"):
        if task == "wikipedia":
            print(task, len(passages()))
            continue
        found = splits(task)
        print(task, {split: len(examples) for split, examples in found.items()}, found["train"][0], sep="\n  ")


if __name__ == "__main__":
    main()
