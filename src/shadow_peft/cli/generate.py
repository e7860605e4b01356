"""`shadow-peft generate`: continues a text with the adapted base, the shadow alone, or any other model.

It needs the core dependencies alone, and no trainer.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.loading import check_quantization, load_answering
from shadow_peft.cli.options import OPTIONS, SamplingOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.generation.drafting import DraftStatistics

DESCRIPTION = "Continues one or more texts with a model and prints what it adds."
EXAMPLES = """examples:
  shadow-peft generate --adapter out "Translate to German: good morning\\n"
  shadow-peft generate --adapter out "the base from another place" \\
      --model Qwen/Qwen3-0.6B
  shadow-peft generate --adapter out "the shadow alone answers" --shadow_only
  shadow-peft generate --adapter out "the shadow drafts, the base verifies" --draft
  shadow-peft generate --adapter out --chat "Hello"
  shadow-peft generate --adapter out/gsm8k-4bit "as it was trained" \\
      --load_in_4bit --use_bnb_nested_quant
  shadow-peft generate --model out/shadow "the exported shadow is a stock model"
  shadow-peft generate --model out/shadow "Once upon a time" \\
      --do_sample --temperature 0.7 --top_p 0.9 --seed 1
"""


def run(arguments: list[str]) -> None:
    """Parse the options, load the model and print one answer per text."""
    parser = VerbParser("generate", OPTIONS["generate"], DESCRIPTION, EXAMPLES)
    parser.add_argument("text", nargs="+", help="Text to continue; the two characters \\n mean a line break")
    options, sampling, quantization, others = parse(parser, arguments)
    check_quantization(quantization)
    if options.draft and (sampling.num_beams or 1) > 1:
        raise UserError("--draft goes with greedy decoding and sampling, not with --num_beams; drop one of them")
    with quiet_libraries():
        model, tokenizer = load_answering(options.model, options.adapter, None, quantization, dtype=options.dtype)
        if options.shadow_only:
            model.set_inference_mode("shadow_only")
        config = generation_config(model, tokenizer, sampling)
        config.use_shadow_draft = options.draft or None
        prompts = [_prompt(text, tokenizer, options.chat) for text in others.text]
        set_seed(options.seed)
        for prompt in prompts:
            answer, statistics = continuation(model, tokenizer, prompt, config, options.chat)
            print(answer, flush=True)
            if statistics is not None:
                print(report(statistics), file=sys.stderr)


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingOptions
) -> GenerationConfig:
    """The model's own generation config with the given options and a padding token.

    Raises:
        UserError: options that do not go together.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    asked = sampling.given()
    of_sampling = [name for name in ("temperature", "top_p", "top_k") if name in asked]
    if of_sampling and not asked.get("do_sample", config.do_sample):
        raise UserError(f"--{of_sampling[0]} does nothing for the likeliest tokens; add --do_sample to draw them")
    try:
        config.update(**asked)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return config


@torch.no_grad()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, config: GenerationConfig, chat: bool = False
) -> tuple[str, DraftStatistics | None]:
    """What the model adds to a prompt, without special tokens, and the statistics of drafting, if it drafted.

    Args:
        chat: the prompt was formatted by a chat template, which wrote the special tokens that it wants.

    Raises:
        UserError: an empty prompt, or options that the model cannot answer with.
    """
    inputs: Any = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt", return_token_type_ids=False).to(
        model.device
    )
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("the text is empty: there is nothing to go on with")
    config.return_dict_in_generate = True
    try:
        output: Any = model.generate(**inputs, generation_config=config)
    except ValueError as error:
        raise UserError(f"cannot generate with these options: {one_line(error)}") from error
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


def _prompt(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> str:
    text = text.replace("\\n", "\n")
    if not chat:
        return text
    if tokenizer.chat_template is None:
        raise UserError("--chat needs a tokenizer with a chat template; this model has none")
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
