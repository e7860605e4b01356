"""`shadow-peft export`: writes the shadow of an adapter as a model that needs neither its base nor this package.

It needs the core dependencies alone, and no trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.backbone.placement import place
from shadow_peft.backbone.projected_lm import AutoModelForCausalLMWithHiddenProjection
from shadow_peft.cli.classifiers import adapts_classifier, load_adapted_classifier
from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.export_options import ExportOptions
from shadow_peft.cli.export_runtime import compare_runtime, require_runtime, write_for_runtime
from shadow_peft.cli.loading import load_answering, load_model, load_tokenizer, named_base
from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.prompts import read_prompts
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.config import CONFIG_FILE
from shadow_peft.export import hf
from shadow_peft.export.check import agreement, classifies, ends_of, generates
from shadow_peft.export.folded import fold
from shadow_peft.export.quantized import quantized
from shadow_peft.export.runtimes import CannotExport
from shadow_peft.tasks.sequence_classification import ShadowForSequenceClassification

DESCRIPTION = (
    "Writes the shadow of an adapter as a model of its own, compares its answers with those of the attached shadow, and "
    "says how many are the same."
)
EXAMPLES = """examples:
  shadow-peft export out                            a folder out/hf for transformers
  shadow-peft export out --overwrite --check data.jsonl   compare the answers, too
  shadow-peft export out --dtype bfloat16 --output small
  shadow-peft export out --no_fold --output apart   keep the projection apart
  shadow-peft export apart --output stock           fold it
  shadow-peft export out --to gguf --type q8_0      a file for llama.cpp
  shadow-peft export out --to html                  a page that answers in a browser
"""


def run(arguments: list[str]) -> None:
    """Parse the options, load base and adapter, write the shadow, and compare."""
    parser = VerbParser("export", OPTIONS["export"], DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "shadow", help="Folder or hub id of a shadow adapter, or of a shadow that was exported with --no_fold"
    )
    options, others = parse(parser, arguments)
    folder = target(options, others.shadow)
    with quiet_libraries():
        require_runtime(options)
        attached, tokenizer, origin = load(options, others.shadow)
        prompts = read_prompts(options.check, tokenizer, options.check_prompts)
        exported = detached(attached, options)
        if options.to == "hf":
            hf.write(exported, tokenizer, folder, origin)
        else:
            write_for_runtime(exported, tokenizer, folder, origin, options)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {type(exported).__name__}, {exported.num_parameters():,} parameters, {size / 1e6:.1f} MB")
        if options.to == "hf":
            print(compare(attached, folder, prompts, options))
        else:
            print(compare_runtime(exported, tokenizer, folder, prompts, options))


def target(options: ExportOptions, shadow: str) -> Path:
    """The folder to write into.

    Raises:
        UserError: it is not given and the adapter is no folder, or something else is there.
    """
    if options.output is None and not Path(shadow).is_dir():
        raise UserError(f"{shadow!r} is no folder to write into; give --output")
    folder = Path(shadow, options.to) if options.output is None else Path(options.output)
    if folder.is_file():
        raise UserError(f"--output {folder} is a file; give a folder")
    if folder.exists() and Path(shadow).exists() and folder.resolve() == Path(shadow).resolve():
        raise UserError(f"--output {folder} is what is exported, which is never written into; give another folder")
    other = hf.what_else_is_in(folder)
    if other is not None:
        raise UserError(f"{folder} holds {other}, which is of no export; give another --output")
    if folder.is_dir() and any(folder.iterdir()) and not options.overwrite:
        raise UserError(f"{folder} holds an export; --overwrite replaces it, or give another --output")
    return folder


def load(options: ExportOptions, shadow: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, hf.Origin]:
    """What the exported shadow is compared with: the attached one, alone, or the projected model that is folded.

    Raises:
        UserError: one of them cannot be loaded.
    """
    if Path(shadow, "config.json").is_file() and not Path(shadow, CONFIG_FILE).is_file():
        return _load_projected(options, shadow)
    name = named_base(shadow) if options.model is None else options.model
    model: Any
    if adapts_classifier(shadow):
        model, tokenizer = load_adapted_classifier(shadow, name, dtype="auto"), load_tokenizer(shadow, name)
    else:
        model, tokenizer = load_answering(options.model, shadow, dtype="auto")
    model.set_inference_mode("shadow_only")
    adapter: Any = model.peft_model
    parameters = adapter.base_model.num_parameters()
    return model.eval(), tokenizer, hf.Origin(shadow, name, adapter.shadow_config.variant, parameters)


def detached(model: PreTrainedModel, options: ExportOptions) -> PreTrainedModel:
    """The model to write.

    Raises:
        UserError: the shadow has no such form.
    """
    try:
        if isinstance(model, AutoModelForCausalLMWithHiddenProjection):
            exported = fold(model)
        else:
            exported = model.export_shadow(fold=options.fold)
    except ValueError as error:
        keep = "; --no_fold keeps the projection apart" if options.fold else ""
        raise UserError(f"cannot export this shadow: {one_line(error)}{keep}") from error
    exported = exported if options.dtype == "auto" else place(exported, getattr(torch, options.dtype))
    if options.quantize == "none":
        return exported
    try:
        return quantized(exported, options.quantize)
    except CannotExport as error:
        raise UserError(f"--quantize {options.quantize}: {error}") from error


def compare(attached: PreTrainedModel, folder: Path, prompts: list[list[int]], options: ExportOptions) -> str:
    """One line: how many answers of what was written are those of the attached shadow."""
    if isinstance(attached, ShadowForSequenceClassification):
        loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
        found = agreement(classifies(attached), classifies(loaded), prompts, options.check_tokens, ends=())
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        ends = ends_of(attached)
        found = agreement(generates(attached), generates(loaded), prompts, options.check_tokens, ends)
    prompt = f"; the first other one is that to prompt {found.others[0] + 1}" if found.others else ""
    return f"loaded again, {found.same} of {found.prompts} answers are those of the attached shadow{prompt}"


def _load_projected(options: ExportOptions, shadow: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, hf.Origin]:
    model = load_model(shadow, dtype="auto").eval()
    if not isinstance(model, AutoModelForCausalLMWithHiddenProjection):
        raise UserError(f"{shadow} is a stock {type(model).__name__} already; there is nothing to fold")
    if not options.fold:
        raise UserError(f"{shadow} keeps its projection apart already; drop --no_fold to fold it")
    return model, load_tokenizer(shadow, options.model or shadow), hf.Origin(shadow, options.model)
