"""`shadow-peft classify`: the class of a text, by the adapted base or the shadow alone.

It needs the core dependencies alone, and no trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.cli.classifiers import load_adapted_classifier, load_classifier
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.loading import check_quantization, load_tokenizer, named_base
from shadow_peft.cli.options import OPTIONS, ClassifyOptions, QuantizationOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.quiet import quiet_libraries

DESCRIPTION = "Prints the class of one or more texts and its probability, one line each."
EXAMPLES = """examples:
  shadow-peft classify --adapter out "Win a prize now"
  shadow-peft classify --adapter out --shadow_only "the shadow alone answers"
  shadow-peft classify --model out/shadow "the exported shadow is a classifier like any other"
"""


def run(arguments: list[str]) -> None:
    """Parse the options, load the classifier and print one line per text."""
    options, quantization, others = parse(make_classify_parser(), arguments)
    check_quantization(quantization)
    with quiet_libraries():
        model, tokenizer = _load(options, quantization)
        for text in others.text:
            name, probability = classified(model, tokenizer, text.replace("\\n", "\n"))
            print(f"{name}  {probability:.1%}", flush=True)


def make_classify_parser() -> VerbParser:
    """The parser of this verb's options."""
    parser = VerbParser("classify", OPTIONS["classify"], DESCRIPTION, EXAMPLES)
    parser.add_argument("text", nargs="+", help="Text to classify; the two characters \\n mean a line break")
    return parser


def _load(options: ClassifyOptions, quantization: QuantizationOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The classifier, and its tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    if options.adapter is None:
        return load_classifier(str(options.model), quantization, dtype=options.dtype), load_tokenizer(options.model)
    tokenizer = load_tokenizer(options.adapter, options.model or named_base(options.adapter))
    model = load_adapted_classifier(options.adapter, options.model, quantization, dtype=options.dtype)
    if options.shadow_only:
        model.set_inference_mode("shadow_only")
    return model, tokenizer


@torch.no_grad()
def classified(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, float]:
    """The likeliest class of a text and its probability.

    Raises:
        UserError: an empty text.
    """
    inputs: Any = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("the text is empty: there is nothing to classify")
    probability, index = model(**inputs).logits[0].float().softmax(-1).max(-1)
    return str(model.config.id2label[int(index)]), float(probability)
