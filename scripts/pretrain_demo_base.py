"""Pretrains the embedded base of ``shadow-peft demo`` from scratch, offline, on two CPU cores.

The text is what every Python carries (the standard library's help topics, docstrings, comments and sources;
PSF licence) plus documents that ``pretrain_text.py`` invents. The committed base was made by

    OMP_NUM_THREADS=2 python scripts/pretrain_demo_base.py --compile

and its loss curve lies beside it (``pretraining.json``, ``pretraining.png``). ``--resume`` goes on after an
interruption.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from pretrain_text import common_words, invented, stdlib_code, stdlib_prose
from pretraining import ROOT, Schedule, pretrain
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


@dataclass
class Text:
    """The documents that base and shadow are pretrained on."""

    invented_characters: int = field(default=26_000_000, metadata={"help": "Size of the invented text."})
    code_characters: int = field(default=6_000_000, metadata={"help": "Size of the sample of sources."})
    prose_copies: int = field(default=3, metadata={"help": "How often the prose of the library is repeated."})


@dataclass
class Shape:
    """The base; the defaults made the committed one."""

    vocabulary: int = field(default=3072, metadata={"help": "Size of the byte-level BPE vocabulary."})
    hidden: int = field(default=192, metadata={"help": "Width of the decoder."})
    layers: int = field(default=6, metadata={"help": "Decoder layers."})
    intermediate: int = field(default=512, metadata={"help": "Width of the MLP."})


@dataclass
class Recipe(Schedule):
    """How the base is trained; the defaults made the committed one."""

    output: Path = field(default=ROOT / "src/shadow_peft/demo/base", metadata={"help": "Folder of the finished base."})
    work: Path = field(default=Path("/tmp/demo-base"), metadata={"help": "Folder of the training checkpoints."})
    steps: int = field(default=2400, metadata={"help": "Optimizer steps that the learning rate is planned for."})
    stop_at: int = field(default=2250, metadata={"help": "Step after which training ends, before the plan does."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate (AdamW)."})


def gather(text: Text, seed: int) -> list[str]:
    """All documents, shuffled by seed."""
    rng = random.Random(seed)
    prose = stdlib_prose()
    made = invented(rng, common_words(prose, 3000), text.invented_characters)
    documents = prose * text.prose_copies + stdlib_code(rng, text.code_characters) + made
    rng.shuffle(documents)
    return documents


def train_tokenizer(documents: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ``<pad>`` (0) and ``<eos>`` (1); digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents[: len(documents) // 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
        model_max_length=2 * context, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, context: int) -> LlamaForCausalLM:
    """A stock Llama of a few million parameters with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate, num_attention_heads=shape.hidden // 32,
        num_key_value_heads=shape.hidden // 64, max_position_embeddings=2 * context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    """Text, tokenizer, training, finished base."""
    recipe, text, shape = HfArgumentParser((Recipe, Text, Shape)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    set_seed(recipe.seed)
    documents = gather(text, recipe.seed)
    tokenizer = train_tokenizer(documents, shape.vocabulary, recipe.context)
    pretrain(build_model(tokenizer, shape, recipe.context), tokenizer, documents, recipe)


if __name__ == "__main__":
    main()
