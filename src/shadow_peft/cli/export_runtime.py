"""`shadow-peft export --to` another format than a folder of transformers: written, then run beside transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.export_options import ExportOptions
from shadow_peft.cli.export_page import page_of
from shadow_peft.export import hf
from shadow_peft.export.check import agreement, ends_of, generates
from shadow_peft.export.runtimes import CannotExport, Running, Settings, Source, cannot_run, runtime


def require_runtime(options: ExportOptions) -> None:
    """Refuse a format before anything is loaded.

    Raises:
        UserError: what writes it is not installed.
    """
    if options.to != "hf":
        try:
            runtime(options.to)
        except CannotExport as error:
            raise UserError(f"--to {options.to}: {error}") from error


def write_for_runtime(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, origin: hf.Origin, options: ExportOptions
) -> None:
    """Write a stock causal language model in the format of `--to`.

    Raises:
        UserError: the format has no such model.
    """
    if model.get_output_embeddings() is None:
        raise UserError(f"--to {options.to} is for language models; a classifier is exported with --to hf")
    if options.to != "gguf":
        model.float()
    settings = Settings(options.type, page_of(model, origin, options))
    module = runtime(options.to)
    with tempfile.TemporaryDirectory() as scratch, hf.replacing(folder) as staging:
        source = Source(model, tokenizer, Path(scratch))
        hf.write(model, tokenizer, source.folder, origin)
        try:
            module.convert(source, staging, settings)
        except CannotExport as error:
            raise UserError(f"cannot export this shadow to {options.to}: {error}") from error
        largest = max(staging.iterdir(), key=lambda path: path.stat().st_size).name
        usage = module.USAGE.replace("{file}", largest)
        hf.card(model, origin, folder.name, usage, options.to).save(staging / hf.CARD)


def compare_runtime(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    prompts: list[list[int]],
    options: ExportOptions,
) -> str:
    """What is to be said of what was written: how many answers in its runtime are those of transformers in float32."""
    reason = cannot_run(options.to)
    if reason is not None:
        return f"not run, so its answers are not compared: {reason}"
    with runtime(options.to).running(folder) as run:
        found = agreement(generates(model.float()), run.answer, prompts, options.check_tokens, ends_of(model))
        differ = _split_otherwise(run, tokenizer, prompts)
    prompt = f"; the first other one is that to prompt {found.others[0] + 1}" if found.others else ""
    tokens = (
        f"\n{differ} of {found.prompts} prompts are split into other tokens than transformers splits them" if differ else ""
    )
    return f"run by {options.to}, {found.same} of {found.prompts} answers are those of transformers{prompt}{tokens}"


def _split_otherwise(run: Running, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> int:
    """Number of prompts whose text the runtime's tokenizer splits into other tokens."""
    if run.tokens is None:
        return 0
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    plain = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return sum(list(run.tokens(text)) != ids for text, ids in zip(texts, plain, strict=True))
