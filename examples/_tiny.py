"""Random models that run anywhere in a second; in your script, load real ones with `from_pretrained`."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128


def _config(hidden_size: int, num_layers: int, **options: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def causal_lm(hidden_size: int = 32, num_layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """Replaces `AutoModelForCausalLM.from_pretrained(...)`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config(hidden_size, num_layers))


def classifier(num_labels: int = 3, seed: int = 0) -> PreTrainedModel:
    """Replaces `AutoModelForSequenceClassification.from_pretrained(..., num_labels=3)`."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(32, 4, num_labels=num_labels))


def token_ids(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Replaces a tokenizer: ids `[B, T]`."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """Replaces `AutoTokenizer.from_pretrained(...)`: a token for each printable ASCII character."""
    names = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127))]
    characters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
