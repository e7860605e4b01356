"""`shadow-peft playground`: a page in the browser where base, attached, detached and drafted answer side by side."""

from __future__ import annotations

from contextlib import suppress
from threading import Event
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.loading import check_quantization, load_answering
from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.playground_options import PlaygroundOptions
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.playground.comparison import warm_up

DESCRIPTION = (
    "Serves a page where the bare base, the adapted base, the shadow alone and the adapted base with drafts answer a prompt "
    "side by side, with their speed, and where each token shows whether base and shadow agree. Ctrl-C ends it."
)
EXAMPLES = """examples:
  shadow-peft playground --adapter out
  shadow-peft playground --adapter out --model Qwen/Qwen3-0.6B --port 8080
  shadow-peft playground --adapter out --prompt "text: open the door keys: action\\n"
"""


def run(arguments: list[str]) -> None:
    """Parse the options, load base and adapter, and serve the page until it is interrupted."""
    options, quantization, _ = parse(make_playground_parser(), arguments)
    check_quantization(quantization)
    try:
        from shadow_peft.playground.page import make_page, serve
    except ImportError as error:  # the help needs no Gradio
        raise UserError(f"{error}; install the extra: pip install 'shadow-peft[playground]'") from error
    with quiet_libraries():
        model, tokenizer, title = _load(options, quantization)
        page = make_page(model, tokenizer, options.prompt.replace("\\n", "\n"), options.max_new_tokens, title)
        try:
            address = serve(page, options.host, options.port)
        except OSError as error:
            raise UserError(f"cannot serve at {options.host}, port {options.port or 'from 7860 on'}: {error}") from error
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            Event().wait()
        page.close()


def make_playground_parser() -> VerbParser:
    """The parser of this verb's options."""
    return VerbParser("playground", OPTIONS["playground"], DESCRIPTION, EXAMPLES)


def _load(options: PlaygroundOptions, quantization: Any) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """The adapted base, warmed up, its tokenizer, and what the page says that they are."""
    model: Any
    model, tokenizer = load_answering(options.model, options.adapter, None, quantization, dtype=options.dtype)
    base = model.peft_model.base_model
    size = f"{base.num_parameters():,} parameters, {str(base.dtype).removeprefix('torch.')}, {model.device}"
    title = f"Adapter `{options.adapter}` on `{base.config.name_or_path}`: {size}"
    warm_up(model.eval(), tokenizer)
    return model, tokenizer, title
