"""The prompts that an export is checked with: rows of JSON lines, or a few of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadow_peft.cli.errors import UserError

DEFAULT = (
    "The capital of France is",
    "Once upon a time there was",
    "def largest(numbers):\n",
    "1, 2, 3, 4,",
)


def read_prompts(path: str | None, tokenizer: PreTrainedTokenizerBase, most: int) -> list[list[int]]:
    """Token ids of the first prompts of a file; without a file, of `DEFAULT`.

    A row has `prompt`, `messages` (the turns before the last answer, formatted with the chat template) or `text`.

    Raises:
        UserError: the file cannot be read, a row has none of them, or there is no row.
    """
    if path is None:
        ids = [list(tokenizer(text)["input_ids"]) for text in DEFAULT]
    else:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"--check {path} is no UTF-8 text") from error
        rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:most]
        ids = [_prompt_ids(f"{path}:{number}", line, tokenizer) for number, line in rows]
    if not ids:
        raise UserError(f"--check {path} has no row")
    empty = next((index for index, prompt in enumerate(ids) if not prompt), None)
    if empty is not None:
        raise UserError(f"--check {path}: prompt {empty + 1} has no token")
    return ids


def _prompt_ids(where: str, line: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"--check {where}: not JSON") from error
    row = row if isinstance(row, dict) else {}
    turns = row.get("messages", row.get("prompt"))
    if isinstance(turns, list) and turns:
        if tokenizer.chat_template is None:
            raise UserError(f"--check {where}: messages need a tokenizer with a chat template; this one has none")
        asked = turns[:-1] if "messages" in row and turns[-1].get("role") == "assistant" else turns
        chat = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        return list(tokenizer(chat, add_special_tokens=False)["input_ids"])  # the template wrote those that it wants
    text = row.get("prompt", row.get("text"))
    if not isinstance(text, str) or not text:
        raise UserError(f"--check {where}: a row needs 'prompt', 'messages' or 'text'")
    return list(tokenizer(text)["input_ids"])
