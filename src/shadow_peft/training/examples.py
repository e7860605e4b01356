"""Reads JSON lines of prompts and completions, conversations or texts; every bad line is reported with its number.

    {"prompt": "Translate to German: good morning\\n", "completion": "Guten Morgen"}
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you"}]}
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello to you"}]}
    {"text": "Once upon a time there was a robot."}

The third are conversations in the words of ShareGPT. A conversation ends with a turn of the assistant. All lines of a file
are of one kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from trl.data_utils import maybe_convert_to_chatml

Example: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal["prompt/completion", "messages", "text"]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Who speaks in the words of ShareGPT -> the role; what is no key is a role already."""
SHOWN = 20


class BadDataError(ValueError):
    """A data file that cannot be used for training; the message lists every bad line as ``file:number: what is wrong``."""

    def __init__(self, problems: list[str]) -> None:
        shown = problems[:SHOWN]
        rest = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n".join([f"{len(problems)} problem(s) in the data:", *shown, *rest]))
        self.problems = problems


def read_examples(path: str | Path) -> list[Example]:
    """All examples of a JSON-lines file, checked before any of them is used.

    Args:
        path: a UTF-8 file with one JSON object per line, all of one kind; blank lines are skipped.

    Returns:
        The objects with their keys `prompt` and `completion`, `messages`, or `text`; other keys are dropped.

    Raises:
        BadDataError: lists every bad line, or says that the file has no examples.
        OSError: the file cannot be read.
    """
    lines = Path(path).read_bytes().splitlines()
    examples: list[Example] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _take(line, examples, problems, f"{path}:{number}")
    if not examples and not problems:
        problems.append(f"{path}: no examples; give one JSON object per line")
    if problems:
        raise BadDataError(problems)
    return examples


def last_turn_as_completion(example: Example) -> Example:
    """A messages example as conversational prompt and completion; the last assistant turn is the completion."""
    messages = example["messages"]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def kind_of(example: Example) -> Kind:
    """The kind of an example."""
    return "messages" if "messages" in example else "text" if "text" in example else "prompt/completion"


def _take(line: bytes, examples: list[Example], problems: list[str], where: str) -> None:
    """Append the example of a line to `examples`, or its problem to `problems`."""
    try:
        example = checked(_parsed(line))
        if examples and kind_of(example) != kind_of(examples[0]):
            raise ValueError(f"a {kind_of(example)} line in a file of {kind_of(examples[0])} lines; use one kind per file")
        examples.append(example)
    except ValueError as error:
        problems.append(f"{where}: {error}")


def _parsed(line: bytes) -> Example:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, got {type(value).__name__}")
    return value


def checked(value: Example) -> Example:
    """The keys of a well-formed example, `prompt` and `completion`, `messages`, or `text`; other keys are dropped.

    Raises:
        ValueError: says what is wrong with it.
    """
    if "messages" in value:
        return {"messages": _checked_messages(value["messages"], "messages")}
    if "conversations" in value:
        return {"messages": _checked_messages(_in_chatml(value["conversations"]), "conversations")}
    keys = ("text",) if "text" in value and not {"prompt", "completion"} & value.keys() else ("prompt", "completion")
    for key in keys:
        if key not in value:
            raise ValueError(f"no {key!r}; a line has 'prompt' and 'completion', 'messages', 'conversations' or 'text'")
        if value[key] is None:
            raise ValueError(f"{key!r} is null")
        if not isinstance(value[key], str):
            raise ValueError(f"{key!r} must be a string, got {type(value[key]).__name__}")
    if not value[keys[-1]].strip():
        raise ValueError(f"{keys[-1]!r} is empty, so there is nothing to learn")
    return {key: value[key] for key in keys}


def _in_chatml(conversation: Any) -> Any:
    """A conversation with roles and contents, by TRL's own conversion, which leaves the names of ShareGPT's speakers."""
    messages = maybe_convert_to_chatml({"conversations": conversation})["messages"]
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and isinstance(message.get("role"), str):
            message["role"] = SHAREGPT_ROLES.get(message["role"], message["role"])
    return messages


def _checked_messages(messages: Any, key: str) -> list[dict[str, str]]:
    """A conversation that ends with a turn of the assistant."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{key!r} must be a list of at least two messages")
    checked = [_checked_message(message, f"{key}[{index}]") for index, message in enumerate(messages)]
    if checked[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, got {checked[-1]['role']!r}")
    if not checked[-1]["content"].strip():
        raise ValueError("the last message is empty, so there is nothing to learn")
    return checked


def _checked_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object, got {type(message).__name__}")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where} has the role {message.get('role')!r}; use one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"{where} must have a string 'content'")
    return {"role": message["role"], "content": message["content"]}
