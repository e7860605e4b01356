"""The data that people bring: what is read, and how every bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from shadow_peft.training.examples import BadDataError, last_turn_as_completion, read_examples
from tests.cli.conftest import write_lines

GOOD = {"prompt": "a", "completion": "b"}
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def test_reads_prompts_and_completions_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [GOOD, "", {**GOOD, "id": 7}])
    assert read_examples(path) == [GOOD, GOOD]


def test_reads_messages_and_learns_the_last_turn(tmp_path: Path) -> None:
    (example,) = read_examples(write_lines(tmp_path / "d.jsonl", [TALK]))
    turns = last_turn_as_completion(example)
    assert turns == {"prompt": TALK["messages"][:1], "completion": TALK["messages"][1:]}


def test_reads_texts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "once", "id": 1}, {"text": "upon a time"}])
    assert read_examples(path) == [{"text": "once"}, {"text": "upon a time"}]


def test_reads_the_conversations_of_sharegpt(tmp_path: Path) -> None:
    turns = [("system", "be kind"), ("human", "hi"), ("gpt", "hello"), ("human", "bye"), ("gpt", "see you")]
    shared = {"conversations": [{"from": who, "value": what} for who, what in turns], "id": "x"}
    chatml = {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    examples = read_examples(write_lines(tmp_path / "d.jsonl", [shared, chatml, TALK]))
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert examples[0] == {"messages": [{"role": r, "content": c} for r, (_, c) in zip(roles, turns, strict=True)]}
    assert examples[1:] == [TALK, TALK]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object was expected, got list"),
        ({"prompt": None, "completion": "b"}, "'prompt' is null"),
        ({"text": " "}, "'text' is empty"),
        ({"text": None}, "'text' is null"),
        ({"text": "once"}, "a text line in a file of prompt/completion lines"),
        ({"conversations": "hi"}, "'conversations' must be a list of at least two messages"),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, "the last message must be the assistant's, got 'user'"),
        ({"conversations": [{"from": "alien", "value": "x"}] * 2}, r"conversations\[0\] has the role 'alien'"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]}, "the last message is empty"),
        ({"prompt": "a"}, "no 'completion'"),
        ({"completion": "a"}, "no 'prompt'"),
        ({"prompt": 1, "completion": "b"}, "'prompt' must be a string, got int"),
        ({"prompt": "a", "completion": "  "}, "'completion' is empty"),
        (TALK, "a messages line in a file of prompt/completion lines"),
        ({"messages": []}, "at least two messages"),
        ({"messages": ["hi", "ho"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "god", "content": "x"}] * 2}, "role 'god'"),
        ({"messages": [{"role": "user", "content": 1}] * 2}, "string 'content'"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "the last message must be the assistant's"),
    ],
)
def test_bad_line_is_named_with_its_number(tmp_path: Path, line: object, said: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", [GOOD, "", line, GOOD])
    with pytest.raises(BadDataError, match=rf"d\.jsonl:3: .*{said}") as caught:
        read_examples(path)
    assert len(caught.value.problems) == 1


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", ["{", GOOD, {"prompt": "a"}, GOOD, "null"])
    with pytest.raises(BadDataError) as caught:
        read_examples(path)
    assert [problem.split(": ")[0].rsplit(":", 1)[1] for problem in caught.value.problems] == ["1", "3", "5"]


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"30 problem\(s\)(.|\n)*and 10 more"):
        read_examples(write_lines(tmp_path / "d.jsonl", ["{"] * 30))


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(BadDataError, match=r"d\.jsonl:2: not UTF-8 at byte 13"):
        read_examples(path)


def test_file_without_examples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="no examples"):
        read_examples(write_lines(tmp_path / "d.jsonl", [""]))
