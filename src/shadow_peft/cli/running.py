"""The trainer of `shadow-peft train`: made, run, and its results saved; Ctrl-C says how to go on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from shadow_peft.cli.errors import InterruptedRunError, UserError, one_line
from shadow_peft.cli.folders import checkpoints, what_is_missing
from shadow_peft.cli.options import TrainOptions
from shadow_peft.cli.progress import TrainingProgress
from shadow_peft.export.head import CannotFold
from shadow_peft.training.card import RunFacts, write_card
from shadow_peft.training.sft import ShadowSFTTrainer


class WithCard:
    """A trainer that writes our model card wherever TRL writes one."""

    facts: RunFacts | None = None
    args: Any
    state: Any

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the card with the figures so far, in one process."""
        if self.facts is not None and self.state.is_world_process_zero:
            write_card(Path(self.args.output_dir), self.facts, self.state.log_history)


class _ShadowTrainer(WithCard, ShadowSFTTrainer):
    pass


class _BaselineTrainer(WithCard, SFTTrainer):
    pass


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    sft: SFTConfig,
    peft: ModelConfig,
    train_set: Dataset,
    eval_set: Dataset | None,
) -> Any:
    """The trainer: ShadowSFTTrainer, or TRL's SFTTrainer for LoRA.

    Raises:
        UserError: the trainer refuses an option, such as a tracker that is not installed; no row has anything to learn.
    """
    arguments: dict[str, Any] = {
        "train_dataset": train_set,
        "eval_dataset": eval_set,
        "processing_class": tokenizer,
        "callbacks": callbacks(options, sft),
    }
    try:
        if peft.use_peft:
            trainer: Any = _BaselineTrainer(model, sft, peft_config=get_peft_config(peft), **arguments)
        else:
            scale = options.shadow_learning_rate_scale
            trainer = _ShadowTrainer(model, sft, shadow_learning_rate_scale=scale, **arguments)
    except (ValueError, TypeError, RuntimeError, ImportError, LookupError, AttributeError, OSError) as error:
        raise UserError(f"cannot train with these options: {one_line(error)}") from error
    for purpose, rows in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if rows is not None and len(rows) == 0:
            raise UserError(
                f"no row is left for {purpose}: all prompts alone fill --max_length {sft.max_length} tokens; raise it"
            )
    return trainer


def show_progress(trainer: Any, progress: TrainingProgress) -> TrainingProgress:
    """Show our bar or lines instead of transformers'."""
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(progress)
    return progress


def fit(trainer: Any, checkpoint: str | None, progress: TrainingProgress, arguments: list[str]) -> dict[str, Any] | None:
    """Train, evaluate at the end, and write the metrics; returns those of the evaluation.

    Raises:
        UserError: options that show only when the first step is made, such as the optimizer's.
        InterruptedRunError: Ctrl-C.
    """
    evaluation = None
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_metrics("train", result.metrics)
        if trainer.eval_dataset is not None:
            evaluation = trainer.evaluate()
            trainer.save_metrics("eval", evaluation)
        trainer.save_state()
    except KeyboardInterrupt:
        raise InterruptedRunError(_how_to_go_on(trainer, progress, arguments)) from None
    except (ValueError, TypeError, RuntimeError, ImportError, LookupError, ArithmeticError) as error:
        if progress.moved:
            raise  # no option is to blame for what the first step could do
        raise UserError(f"the training does not start: {one_line(error)}") from error
    finally:
        progress.close()
    return evaluation


def _how_to_go_on(trainer: Any, progress: TrainingProgress, arguments: list[str]) -> str:
    """One line: where the run stopped, and the command that resumes it."""
    where = f"interrupted after step {progress.step} of {progress.steps}"
    if any(what_is_missing(folder) is None for folder in checkpoints(Path(trainer.args.output_dir))):
        resumed = shlex.join([*_without_resuming(arguments), "--resume_from_checkpoint", "last"])
        launched = "the same launcher and: " if trainer.args.world_size > 1 else ""
        return f"{where}; resume with: {launched}shadow-peft train {resumed}"
    return f"{where}, before the first checkpoint, so there is nothing to resume; --save_steps N saves one every N steps"


def save(trainer: Any, tokenizer: PreTrainedTokenizerBase, output: Path, export: bool) -> None:
    """Save adapter, tokenizer and card into `output`; with `export`, also the exported shadow into `output/shadow`."""
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded, an adapter is one file
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output), _internal_call=True)
    if export and trainer.is_world_process_zero():
        _exported(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(output / "shadow")
        tokenizer.save_pretrained(output / "shadow")
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _exported(model: Any) -> PreTrainedModel:
    """The shadow as a stock model; where it cannot be folded, with its projection apart, since the run is over."""
    try:
        folded: PreTrainedModel = model.export_shadow(fold=True)
    except CannotFold as error:
        print(f"note: the shadow is exported with its projection apart: {one_line(error)}", file=sys.stderr)
        folded = model.export_shadow()
    return folded


def _without_resuming(arguments: list[str]) -> list[str]:
    """The arguments without those that say where a run begins."""
    kept: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name = argument.partition("=")[0].replace("-", "_")
        if name == "__resume_from_checkpoint":
            waiting = waiting if "=" in argument else waiting[1:]
        elif name == "__overwrite":
            waiting = waiting[1:] if waiting and waiting[0].lower() in ("true", "false") else waiting
        else:
            kept.append(argument)
    return kept


def callbacks(options: TrainOptions, sft: SFTConfig) -> list[EarlyStoppingCallback]:
    """Early stopping, if asked for. It keeps the best checkpoint, so evaluation and saving must coincide."""
    if options.early_stopping_patience is None:
        return []
    sft.load_best_model_at_end = True
    sft.metric_for_best_model = sft.metric_for_best_model or "eval_loss"
    sft.greater_is_better = bool(sft.greater_is_better)
    return [EarlyStoppingCallback(options.early_stopping_patience, options.early_stopping_threshold)]
