"""`shadow-peft train`: fine-tunes a causal language model with a shadow on the user's own JSON lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, TrlParser

from shadow_peft.causal_lm import ShadowForCausalLM
from shadow_peft.cli.loading import load_model, load_tokenizer
from shadow_peft.cli.parsing import UserError, make_parser, parse
from shadow_peft.config import ShadowConfig
from shadow_peft.model import get_shadow_model
from shadow_peft.training.examples import BadDataError, kind_of, last_turn_as_completion, read_examples
from shadow_peft.training.sft import ShadowSFTTrainer

DESCRIPTION = (
    "Fine-tunes a causal language model with a shadow. --data is a file of JSON lines, either all "
    '{"prompt": ..., "completion": ...} or all {"messages": [...]}; only completions (of messages: the last turn) are '
    "learned. The options are those of this verb, of ShadowConfig and of TRL's SFTConfig."
)
EXAMPLES = """examples:
  shadow-peft train --model Qwen/Qwen3-0.6B --data commands.jsonl --output out
  shadow-peft train --model Qwen/Qwen3-0.6B --data chat.jsonl --eval_data held-out.jsonl --output out --export
  shadow-peft train --model ./base --data d.jsonl --output out --num_shadow_layers 2 --learning_rate 5e-4 --max_steps 1000
  shadow-peft train --config recipe.yaml
"""

#: Defaults of SFTConfig that suit an adapter; everything else is TRL's.
DEFAULTS = {"learning_rate": 1e-3, "report_to": "none", "activation_checkpointing": False, "logging_steps": 10}


@dataclass
class TrainOptions:
    """Options of `shadow-peft train` itself."""

    model: str = field(metadata={"help": "Folder or hub id of the base."})
    data: str = field(metadata={"help": "JSON lines to learn."})
    output: str = field(metadata={"help": "Folder of the adapter, the tokenizer and the checkpoints."})
    eval_data: str | None = field(default=None, metadata={"help": "JSON lines to evaluate on."})
    export: bool = field(default=False, metadata={"help": "Also save the shadow as a model of its own, OUTPUT/shadow."})
    shadow_loss_weight: float = field(default=0.05, metadata={"help": "Weight of the shadow's own loss."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the base: auto, float32, bfloat16, float16."})


def run(arguments: list[str]) -> None:
    """Parses the options, checks all data, trains and saves."""
    options, shadow, sft = parse(make_train_parser(), arguments)
    if sft.output_dir != "trainer_output":
        raise UserError("give the folder as --output, not as --output_dir")
    sft.output_dir = options.output
    train_examples = _examples(options.data)
    eval_examples = _examples(options.eval_data) if options.eval_data else None
    tokenizer = load_tokenizer(options.model)
    _check_template(tokenizer, train_examples, options.data)
    set_seed(sft.seed)
    model = build(options, shadow)
    fit(model, tokenizer, sft, train_examples, eval_examples)
    save(model, tokenizer, Path(options.output), options.export)


def make_train_parser() -> TrlParser:
    """The parser: this verb's options, ShadowConfig's and SFTConfig's with defaults that suit an adapter."""
    parser = make_parser("train", [TrainOptions, ShadowConfig, SFTConfig], DESCRIPTION, EXAMPLES)
    parser.set_defaults(**DEFAULTS, bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    return parser


def build(options: TrainOptions, shadow: ShadowConfig) -> ShadowForCausalLM:
    """The base with a fresh shadow."""
    base: PreTrainedModel = load_model(options.model, dtype=options.dtype)
    try:
        return ShadowForCausalLM(get_shadow_model(base, shadow), shadow_loss_weight=options.shadow_loss_weight)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot give {options.model!r} such a shadow: {error}") from error


def fit(
    model: ShadowForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sft: SFTConfig,
    train_examples: list[dict[str, object]],
    eval_examples: list[dict[str, object]] | None,
) -> None:
    """Trains by TRL's supervised fine-tuning, with the model's own loss."""
    trainer = ShadowSFTTrainer(
        model,
        sft,
        train_dataset=Dataset.from_list(train_examples),
        eval_dataset=None if eval_examples is None else Dataset.from_list(eval_examples),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=sft.resume_from_checkpoint)


def save(model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path, export: bool) -> None:
    """Adapter and tokenizer into `output`; with `export`, the shadow as a model of its own into `output/shadow`."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    if export:
        model.export_shadow().save_pretrained(output / "shadow")
        tokenizer.save_pretrained(output / "shadow")


def _examples(path: str) -> list[dict[str, object]]:
    """The checked examples of a file as prompts and completions."""
    try:
        examples = read_examples(path)
    except BadDataError as error:
        raise UserError(str(error)) from error
    return [last_turn_as_completion(e) if kind_of(e) == "messages" else e for e in examples]


def _check_template(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, object]], path: str) -> None:
    if isinstance(examples[0]["prompt"], list) and tokenizer.chat_template is None:
        raise UserError(
            f"{path} holds messages, but the tokenizer has no chat template; "
            "use a model with one, or prompt/completion lines"
        )
