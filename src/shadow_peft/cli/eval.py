"""`shadow-peft eval`: scores a model with lm-evaluation-harness: the adapted base, the shadow alone, or any other model."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.loading import check_quantization, load_answering
from shadow_peft.cli.options import OPTIONS, EvalOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.screen import Screen
from shadow_peft.outputs import InferenceMode
from shadow_peft.storage.versions import versions_of

DESCRIPTION = """Scores a model with lm-evaluation-harness: a base with its shadow adapter in
either inference mode, or any other model that transformers loads, such as an
exported shadow or the folder of a LoRA adapter."""
EXAMPLES = """examples:
  shadow-peft eval --adapter out --tasks gsm8k
  shadow-peft eval --adapter out --tasks gsm8k mmlu --inference_mode both \\
      --output scores.json
  shadow-peft eval --adapter out --include_path recipes/tasks \\
      --tasks amazon_reviews --limit 100
  shadow-peft eval --adapter out/gsm8k-4bit --tasks gsm8k --load_in_4bit \\
      --use_bnb_nested_quant
  shadow-peft eval --model Qwen/Qwen3-0.6B --tasks gsm8k --limit 100
  shadow-peft eval --model out/gsm8k-lora --tasks gsm8k
"""
evaluator.get_git_commit_hash = lambda: get_commit_from_path(Path.cwd())  # its own calls git, which prints "fatal: ..."
PACKAGES = ("lm_eval", "shadow-peft", "torch", "transformers")


def run(arguments: list[str]) -> None:
    """Parse the options, score every mode and print the tables."""
    options, quantization, _ = parse(VerbParser("eval", OPTIONS["eval"], DESCRIPTION, EXAMPLES), arguments)
    check_quantization(quantization)
    manager = find_tasks(options.tasks, options.include_path)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it remarks that it is handed a model, on every run
    screen = Screen()
    with quiet_libraries():
        model, tokenizer = load_answering(options.model, options.adapter, device, quantization, dtype=options.dtype)
        name = options.model or model.peft_model.base_model.name_or_path
        rows = [("model", name), *([("adapter", options.adapter)] if options.adapter else [])]
        dtype = str(model.dtype).removeprefix("torch.")
        screen.panel("eval", [*rows, ("tasks", " ".join(options.tasks)), ("device", f"{device}; model in {dtype}")])
        results = {}
        for mode in _modes(options):
            results[mode] = score(model, tokenizer, mode, options, manager)
            screen.line(f"{name}{f' with {options.adapter}, {mode}' if options.adapter else ''}", "bold")
            print(make_table(results[mode]))
    if options.output is not None:
        write_results(Path(options.output), results, name, options, arguments)


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mode: str, options: EvalOptions, manager: TaskManager
) -> dict[str, Any]:
    """The harness's results of a model in one inference mode; "bare" means a model without a shadow."""
    if mode != "bare":
        model.set_inference_mode(mode)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_batch(options.batch_size))
    if not sys.stderr.isatty():
        for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(harness, request, partial(getattr(harness, request), disable_tqdm=True))
    results = simple_evaluate(
        harness,
        tasks=options.tasks,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        log_samples=options.log_samples,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    assert results is not None  # the harness gives None to processes other than the first
    return dict(results)


def find_tasks(tasks: list[str], include_path: str | None) -> TaskManager:
    """The harness's catalogue; its own tasks are read only if a task is not found in `include_path`.

    Raises:
        UserError: names an unknown task, or a folder that does not exist.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path} is no folder")
    for defaults in (False, True):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        missing = [task for task in tasks if not manager.match_tasks([task])]
        if not missing:
            return manager
    place = f" nor in {include_path}" if include_path else ""
    raise UserError(f"there is no task {', '.join(missing)} in lm-evaluation-harness {version('lm_eval')}{place}")


def write_results(path: Path, results: dict[str, Any], model: str, options: EvalOptions, arguments: list[str]) -> None:
    """Write the results of every mode with command and versions as JSON."""
    provenance = {
        "command": f"shadow-peft eval {shlex.join(arguments)}",
        "model": model,
        "adapter": options.adapter,
        "seed": options.seed,
        "versions": versions_of(PACKAGES),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"provenance": provenance, "modes": results}, indent=1, default=handle_non_serializable)
    path.write_text(text + "\n", encoding="utf-8")


def _modes(options: EvalOptions) -> list[str]:
    if options.adapter is None:
        return ["bare"]
    return list(get_args(InferenceMode)) if options.inference_mode == "both" else [options.inference_mode]


def _batch(given: str) -> int | str:
    """The batch size as a number, or "auto" and its forms for the harness."""
    return given if given.startswith("auto") else int(given)
