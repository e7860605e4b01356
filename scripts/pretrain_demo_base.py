"""Pretrains the embedded base of ``shadow-peft demo`` from scratch, offline, on a CPU core.

The text is real text of package registries (``registry_text.py``) and documents that ``invented_text.py`` writes.
The committed base was made by

    python scripts/registry_text.py --output corpus
    OMP_NUM_THREADS=1 python scripts/pretrain_demo_base.py --corpus corpus --compile

and its loss curve lies beside it (``pretraining.json``, ``pretraining.png``). ``--resume`` goes on after an
interruption.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_from_disk
from invented_text import common_words, invented
from pretraining import ROOT, Schedule, pack, pretrain
from registry_text import SOURCES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


@dataclass
class Text:
    """The documents that base and shadow are pretrained on."""

    corpus: Path = field(metadata={"help": "Folder that registry_text.py wrote."})
    invented_characters: int = field(default=100_000_000, metadata={"help": "Size of the invented text."})


@dataclass
class Shape:
    """The base; the defaults made the committed one."""

    vocabulary: int = field(default=4096, metadata={"help": "Size of the byte-level BPE vocabulary."})
    hidden: int = field(default=192, metadata={"help": "Width of the decoder."})
    layers: int = field(default=8, metadata={"help": "Decoder layers."})
    intermediate: int = field(default=512, metadata={"help": "Width of the MLP."})


@dataclass
class Recipe(Schedule):
    """How the base is trained; the defaults made the committed one."""

    output: Path = field(default=ROOT / "src/shadow_peft/demo/base", metadata={"help": "Folder of the finished base."})
    work: Path = field(default=Path("/tmp/demo-base"), metadata={"help": "Folder of the training checkpoints."})
    steps: int = field(default=15_000, metadata={"help": "Optimizer steps that the learning rate is planned for."})
    stop_at: int = field(default=15_000, metadata={"help": "Step after which training ends."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate (AdamW)."})


def gather(text: Text, seed: int) -> list[str]:
    """All documents, shuffled by seed."""
    rng = random.Random(seed)
    real = [document for name in SOURCES for document in read(text.corpus / f"{name}.jsonl")]
    documents = real + invented(rng, common_words(real, 6000), text.invented_characters)
    rng.shuffle(documents)
    return documents


def read(path: Path) -> list[str]:
    """The texts of one source."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


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
    tokenizer.train_from_iterator(documents[: len(documents) // 6], trainer)
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
    """Text, tokenizer, blocks of tokens (both kept in ``--work``), training, finished base."""
    recipe, text, shape = HfArgumentParser((Recipe, Text, Shape)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    set_seed(recipe.seed)
    if not (recipe.work / "blocks").exists():
        documents = gather(text, recipe.seed)
        tokenizer = train_tokenizer(documents, shape.vocabulary, recipe.context)
        tokenizer.save_pretrained(recipe.work)
        pack(documents, tokenizer, recipe.context).save_to_disk(recipe.work / "blocks")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.work)
    blocks = load_from_disk(recipe.work / "blocks").with_format("torch")
    pretrain(build_model(tokenizer, shape, recipe.context), tokenizer, blocks, recipe)


if __name__ == "__main__":
    main()
