"""README and documentation as sections with their code blocks, and a folder in which the blocks run.

A reader copies from one section and needs nothing of another: the blocks of a section run one after another, from nothing.
Names of the hub (`Qwen/Qwen3-0.6B`) are folders with tiny models there, which `from_pretrained` prefers to the hub.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from shadow_peft.demo.robot_commands import commands
from tests.cli.conftest import TEMPLATE, tiny_tokenizer, write_lines
from tests.cli.stand_ins import stand_in
from tests.tiny_models import causal_lm, qwen3

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = {"Qwen/Qwen3-0.6B": 64, "Qwen/Qwen3-4B": 128, "Qwen/Qwen3-8B": 128}
"""Name -> width of the tiny model of that name, in blocks of 64, which 4 bits need."""


class Section(NamedTuple):
    """A section of a page: its name, such as `docs/scale.md: Scale`, and its code blocks (language, text)."""

    name: str
    blocks: list[tuple[str, str]]

    def texts(self, language: str) -> list[str]:
        """The blocks of a language."""
        return [text for name, text in self.blocks if name == language]


def sections(page: Path) -> list[Section]:
    """The sections of a page, a heading of any level each, that have a code block."""
    found: list[Section] = [Section(f"{page.relative_to(ROOT)}", [])]
    language, lines = None, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if language is not None:
            if line.startswith("```"):
                found[-1].blocks.append((language, "\n".join(lines) + "\n"))
                language, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            language = line[3:]
        elif line.startswith("#"):
            found.append(Section(f"{page.relative_to(ROOT)}: {line.lstrip('# ')}", []))
    assert language is None, f"{page} ends inside a code block"
    return [section for section in found if section.blocks]


def shell_commands(text: str) -> list[str]:
    """The commands of a shell block, continued lines joined, without comments."""
    lines = re.sub(r"\\\n *", "", text).splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*$", "", line).strip())]


def tiny_base(width: int) -> PreTrainedModel:
    """A random Qwen3 for the tiny tokenizer."""
    return qwen3(vocab_size=300, hidden_size=width, intermediate_size=1024, head_dim=16, eos_token_id=1, bos_token_id=None)


def make_place(folder: Path) -> None:
    """Fill a folder with the models, data and adapters that the pages name."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name, width in MODELS.items():
        tiny_base(width).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "Qwen" / "Qwen3-0.6B", folder / "base")
    for name in ("commands.jsonl", "data.jsonl", "d.jsonl"):
        write_lines(folder / name, [c.row() for c in commands("train", 16)])
    write_lines(folder / "unseen.jsonl", [c.row() for c in commands("test", 100)])
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to you"}]
    for name in ("chat.jsonl", "held-out.jsonl"):
        write_lines(folder / name, [{"messages": talk}] * 8)
    mails = [("Win a prize now", "spam"), ("Lunch at noon?", "ham")] * 10
    write_lines(folder / "mails.jsonl", [{"text": text, "label": label} for text, label in mails])
    base = tiny_base(MODELS["Qwen/Qwen3-0.6B"])
    base.name_or_path = "Qwen/Qwen3-0.6B"  # as if it had been loaded under that name
    causal_lm(base, injection_hidden_size=16, gate_hidden_size=10).save_pretrained(folder / "adapter")
    causal_lm(base, variant="peft").save_pretrained(folder / "peft-adapter")
    checkpoint = folder / "run" / "checkpoint-500"  # of a Trainer of 0.1.x: one file without a config
    checkpoint.mkdir(parents=True)
    save_file(load_file(folder / "adapter" / "shadow_adapter.safetensors"), checkpoint / "model.safetensors")
    (folder / "openai").mkdir()
    stand_in("openai/gsm8k", folder).rename(folder / "openai" / "gsm8k")
