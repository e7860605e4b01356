"""`shadow-peft generate`: continues a text with the adapted base, the shadow alone, or any other model."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.loading import check_quantization, load_adapted, load_base, load_tokenizer
from shadow_peft.cli.options import OPTIONS, GenerateOptions, QuantizationOptions, SamplingOptions
from shadow_peft.cli.parsing import make_parser, parse
from shadow_peft.generation.drafting import DraftStatistics
from shadow_peft.tasks.causal_lm import ShadowForCausalLM

DESCRIPTION = "Continues one or more texts with a model and prints what it adds."
EXAMPLES = """examples:
  shadow-peft generate --model Qwen/Qwen3-0.6B --adapter out "Translate to German: good morning\\n"
  shadow-peft generate "the shadow alone answers" --model Qwen/Qwen3-0.6B --adapter out --shadow_only
  shadow-peft generate "the shadow drafts, the base verifies" --model Qwen/Qwen3-0.6B --adapter out --draft
  shadow-peft generate "the exported shadow is a model like any other" --model out/shadow
  shadow-peft generate "as it was trained" --model Qwen/Qwen3-0.6B --adapter out/gsm8k-4bit --load_in_4bit
  shadow-peft generate "Once upon a time" --model out/shadow --do_sample --temperature 0.7 --top_p 0.9 --seed 1
"""


def run(arguments: list[str]) -> None:
    """Parse the options, load the model and print one answer per text."""
    parser = make_parser("generate", OPTIONS["generate"], DESCRIPTION, EXAMPLES)
    parser.add_argument("text", nargs="+", help="Text to continue; the two characters \\n mean a line break.")
    options, sampling, quantization, positional = parse(parser, arguments)
    check_quantization(quantization)
    if (options.shadow_only or options.draft) and options.adapter is None:
        raise UserError("--shadow_only and --draft need --adapter: a bare model has no shadow")
    if options.shadow_only and options.draft:
        raise UserError("--draft needs the base, and --shadow_only switches it off")
    tokenizer = load_tokenizer(options.adapter, options.model)
    model = _model(options, quantization)
    set_seed(options.seed)
    config = generation_config(model, tokenizer, sampling)
    config.use_shadow_draft = options.draft or None
    for text in positional.text:
        answer, statistics = continuation(model, tokenizer, _prompt(text, tokenizer, options.chat), config)
        print(answer)
        if statistics is not None:
            print(report(statistics), file=sys.stderr)


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingOptions
) -> GenerationConfig:
    """The model's own generation config with the given options and a padding token."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config.update(**{name: value for name, value in vars(sampling).items() if value is not None})
    return config


@torch.no_grad()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, config: GenerationConfig
) -> tuple[str, DraftStatistics | None]:
    """What the model adds to a prompt, without special tokens, and the statistics of drafting, if it drafted."""
    inputs: Any = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    config.return_dict_in_generate = True
    output: Any = model.generate(**inputs, generation_config=config)
    added: str = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return added, output.get("draft_statistics")


def report(statistics: DraftStatistics) -> str:
    """One line with the drafting statistics of one answer."""
    positions = zip(statistics.accepted_at, statistics.drafted_at, strict=True)
    by_position = " ".join(f"{accepted}/{drafted}" for accepted, drafted in positions)
    return (
        f"drafted {statistics.drafted}, accepted {statistics.accepted} ({statistics.acceptance_rate:.0%}), "
        f"{statistics.tokens_per_base_pass:.2f} tokens per base pass; accepted by position: {by_position or '-'}"
    )


def _model(options: GenerateOptions, quantization: QuantizationOptions) -> PreTrainedModel:
    base = load_base(options.model, quantization, dtype=options.dtype).eval()
    if options.adapter is None:
        return base
    model: ShadowForCausalLM = load_adapted(base, options.adapter)
    model.set_inference_mode("shadow_only" if options.shadow_only else "base_shadow")
    return model


def _prompt(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> str:
    text = text.replace("\\n", "\n")
    if not chat:
        return text
    if tokenizer.chat_template is None:
        raise UserError("--chat needs a tokenizer with a chat template; this model has none")
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
