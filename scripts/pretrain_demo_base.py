"""Pretrains the embedded base of ``shadow-peft demo`` from scratch, offline, on two CPU cores.

The text is what every Python carries (the standard library's help topics, docstrings, comments and sources;
PSF licence) plus documents that ``pretrain_text.py`` invents. The committed base was made by

    OMP_NUM_THREADS=2 python scripts/pretrain_demo_base.py --compile

and its loss curve lies beside it (``pretraining.json``, ``pretraining.png``). ``--resume`` goes on after an
interruption.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from pretrain_text import common_words, invented, stdlib_code, stdlib_prose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

ROOT = Path(__file__).resolve().parents[1]
LICENCE_NOTE = (
    "Weights and tokenizer: Apache-2.0, made by this project's scripts/pretrain_demo_base.py. Training text: the Python "
    "standard library's own help topics, docstrings, comments and sources (Copyright (c) 2001 Python Software "
    "Foundation, PSF License Version 2) and text invented by scripts/pretrain_text.py. No text of others is stored here."
)


@dataclass
class Recipe:
    """Everything that decides the base; the defaults made the committed one."""

    output: Path = field(default=ROOT / "src/shadow_peft/demo/base", metadata={"help": "Folder of the finished base."})
    work: Path = field(default=Path("/tmp/demo-base"), metadata={"help": "Folder of the training checkpoints."})
    steps: int = field(default=2400, metadata={"help": "Optimizer steps that the learning rate is planned for."})
    stop_at: int = field(default=2250, metadata={"help": "Step after which training ends, before the plan does."})
    batch: int = field(default=16, metadata={"help": "Blocks per step."})
    context: int = field(default=256, metadata={"help": "Tokens per block."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate (AdamW)."})
    vocabulary: int = field(default=3072, metadata={"help": "Size of the byte-level BPE vocabulary."})
    hidden: int = field(default=192, metadata={"help": "Width of the decoder."})
    layers: int = field(default=6, metadata={"help": "Decoder layers."})
    intermediate: int = field(default=512, metadata={"help": "Width of the MLP."})
    invented_characters: int = field(default=26_000_000, metadata={"help": "Size of the invented text."})
    code_characters: int = field(default=6_000_000, metadata={"help": "Size of the sample of sources."})
    prose_copies: int = field(default=3, metadata={"help": "How often the prose of the library is repeated."})
    seed: int = field(default=0, metadata={"help": "Seed of text, weights and order."})
    compile: bool = field(default=False, metadata={"help": "Use torch.compile (twice as fast; needs a C++ compiler)."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in --work."})


def gather(recipe: Recipe) -> list[str]:
    """All documents, shuffled by seed."""
    rng = random.Random(recipe.seed)
    prose = stdlib_prose()
    made = invented(rng, common_words(prose, 3000), recipe.invented_characters)
    documents = prose * recipe.prose_copies + stdlib_code(rng, recipe.code_characters) + made
    rng.shuffle(documents)
    return documents


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ``<pad>`` (0) and ``<eos>`` (1); digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents[: len(documents) // 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
        model_max_length=2 * recipe.context, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, context: int) -> Dataset:
    """One stream of tokens, documents parted by ``<eos>``, cut into blocks ``[context]``."""
    ids = tokenizer(documents, verbose=False)["input_ids"]
    stream = np.concatenate([np.array([*row, tokenizer.eos_token_id], dtype=np.int64) for row in ids])
    blocks = stream[: len(stream) // context * context].reshape(-1, context)
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A stock Llama of a few million parameters with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
        intermediate_size=recipe.intermediate, num_attention_heads=recipe.hidden // 32,
        num_key_value_heads=recipe.hidden // 64, max_position_embeddings=2 * recipe.context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """AdamW, warm-up, constant rate, cosine decay over the last quarter."""
    return TrainingArguments(
        output_dir=str(recipe.work), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch, learning_rate=recipe.learning_rate, weight_decay=0.1,
        adam_beta2=0.95, lr_scheduler_type="warmup_stable_decay", warmup_steps=100,
        lr_scheduler_kwargs={"num_decay_steps": recipe.steps // 4}, bf16=True, use_cpu=True,
        logging_steps=25, eval_strategy="steps", eval_steps=250, save_steps=250, save_total_limit=2,
        seed=recipe.seed, data_seed=recipe.seed, dataloader_drop_last=True, report_to="none",
        torch_compile=recipe.compile, prediction_loss_only=True,
    )  # fmt: skip


class StopAt(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        control.should_training_stop |= state.global_step >= self.step
        return control


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """The finished base in bfloat16, with its tokenizer and licence note."""
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "LICENSE-NOTE.txt").write_text(LICENCE_NOTE + "\n", encoding="utf-8")


def save_curve(history: list[dict[str, float]], recipe: Recipe, facts: dict[str, object]) -> None:
    """The loss curve as JSON, with recipe and versions, and as a picture."""
    curve = {
        "train": [[row["step"], row["loss"]] for row in history if "loss" in row],
        "held_out": [[row["step"], row["eval_loss"]] for row in history if "eval_loss" in row],
    }
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(recipe).items()}
    settings["output"], settings["work"] = "src/shadow_peft/demo/base", "(checkpoints)"
    report = {"facts": facts, "recipe": settings, "curve": curve}
    (recipe.output / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(curve, recipe.output / "pretraining.png")


def draw(curve: dict[str, list[list[float]]], path: Path) -> None:
    """Train and held-out loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curve.items():
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", ylim=(1, 6))
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Text, tokenizer, training, finished base."""
    (recipe,) = HfArgumentParser(Recipe).parse_args_into_dataclasses()  # type: ignore[arg-type]
    set_seed(recipe.seed)
    documents = gather(recipe)
    tokenizer = train_tokenizer(documents, recipe)
    data = pack(documents, tokenizer, recipe.context)
    held_out, train = data.select(range(128)), data.select(range(128, len(data)))
    model = build_model(tokenizer, recipe)
    facts: dict[str, object] = {
        "parameters": model.num_parameters(), "train_tokens": len(train) * recipe.context,
        "characters": sum(map(len, documents)), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", "scripts/pretrain_demo_base.py", *sys.argv[1:]]),
    }  # fmt: skip
    print(facts, flush=True)
    trainer = Trainer(
        model,
        training_arguments(recipe),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        callbacks=[StopAt(recipe.stop_at)],
    )
    tokenizer.save_pretrained(recipe.work)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=recipe.resume)
    facts["seconds"] = round(time.monotonic() - started)
    save_base(model, tokenizer, recipe.output)
    save_curve(trainer.state.log_history, recipe, facts)


if __name__ == "__main__":
    main()
