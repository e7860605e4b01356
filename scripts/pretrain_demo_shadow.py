"""Pretrains the embedded shadow of ``shadow-peft demo``: a cut of the embedded base, trained on the text of the base.

It is a call of ``shadow-peft pretrain`` on the documents that ``pretrain_demo_base.py`` gathers, in their order: the blocks
held out are those that were held out from the base, and the shadow may read no more tokens than the base did. The shape of
the shadow, and what it learns, are given by the options of ``shadow-peft pretrain``. The committed one was made by

    python scripts/pretrain_demo_shadow.py --corpus corpus --max_steps 4000 --compile --num_shadow_layers 3
        --shadow_init base --shadow_init_layers even --shadow_intermediate_size 256 --shadow_num_attention_heads 6
        --shadow_num_key_value_heads 3 --next_token_weight 0 --distillation_weight 1 --top_k 32

``--resume`` goes on after an interruption.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain_demo_base import Text, gather
from pretraining import HELD_OUT_BLOCKS, LICENCE_NOTE, ROOT, script
from transformers import HfArgumentParser

from shadow_peft.cli import main as shadow_peft
from shadow_peft.demo.embedded import BASE_PATH

#: Files of a finished run that belong to the demo; the others are for resuming.
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "pretraining.json", "losses.png", "README.md",
)  # fmt: skip


@dataclass
class Recipe:
    """What is decided here; every other option goes to ``shadow-peft pretrain``."""

    max_steps: int = field(metadata={"help": "Optimizer steps."})
    base: Path = field(default=BASE_PATH, metadata={"help": "Folder of the base."})
    output: Path = field(default=ROOT / "src/shadow_peft/demo/shadow", metadata={"help": "Folder of the finished shadow."})
    work: Path = field(default=Path("/tmp/demo-shadow"), metadata={"help": "Folder of the text and of the run."})
    batch: int = field(default=16, metadata={"help": "Blocks per step."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate (AdamW)."})


def main() -> None:
    """Text, pretraining, finished shadow."""
    recipe, text, options = HfArgumentParser((Recipe, Text)).parse_args_into_dataclasses(  # type: ignore[arg-type]
        return_remaining_strings=True
    )
    base = json.loads((recipe.base / "pretraining.json").read_text(encoding="utf-8"))["recipe"]
    read = min(base["steps"], base["stop_at"]) * base["batch"]
    if recipe.max_steps * recipe.batch > read:
        sys.exit(f"--max_steps {recipe.max_steps} of {recipe.batch} blocks are more than the {read:,} that the base read")
    documents, run = recipe.work / "documents.jsonl", recipe.work / "run"
    if not documents.exists():
        write(gather(text, base["seed"]), documents)
    status = shadow_peft([*arguments(recipe, base, documents, run), *options])
    if status:
        sys.exit(status)
    recipe.output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(run / name, recipe.output / name)
    (recipe.output / "LICENSE-NOTE.txt").write_text(LICENCE_NOTE.format(script=script()) + "\n", encoding="utf-8")


def write(texts: list[str], path: Path) -> None:
    """Lines of ``{"text": ...}``; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    unfinished.replace(path)


def arguments(recipe: Recipe, base: dict[str, Any], documents: Path, run: Path) -> list[str]:
    """Of ``shadow-peft pretrain``: documents in their order, so that what was held out from the base is held out here."""
    given = {
        "model": recipe.base, "data": documents, "output": run, "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.batch, "learning_rate": recipe.learning_rate, "warmup_steps": 200,
        "context": base["context"], "held_out": HELD_OUT_BLOCKS, "shuffle_buffer": 1, "seed": base["seed"],
        "data_licence": "what scripts/registry_text.py lists, each text under its own",
    }  # fmt: skip
    return ["pretrain", "--use_cpu", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


if __name__ == "__main__":
    main()
