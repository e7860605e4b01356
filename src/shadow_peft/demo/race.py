"""The race: base + shadow and PEFT LoRA with the same commands, order, steps and number of trainable parameters.

The contenders run at the same time, each in a process of its own on half of the cores. So each has its own peak memory, and
other load on the machine slows both.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from datasets import Dataset
from datasets import disable_progress_bars as disable_bars_of_datasets
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from shadow_peft.config import ShadowConfig
from shadow_peft.demo.drafting import Drafting, measure_drafting
from shadow_peft.demo.embedded import BASE_PATH, SHADOW_PATH, load_base, load_shadow, load_tokenizer
from shadow_peft.demo.measure import peak_memory_mb
from shadow_peft.demo.robot_commands import Command, commands
from shadow_peft.demo.scoring import Scores, score
from shadow_peft.model import get_shadow_model
from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.training.sft import ShadowSFTTrainer

#: A curve: steps and losses in nats per token.
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Progress:
    """How far a contender is; it travels between processes.

    Args:
        contender: its name.
        work: what it does.
        done, total: optimizer steps, or commands of the test split.
        losses: of the last steps by name, nats per token: `loss`, and `detached` where there is a shadow.
    """

    contender: str
    work: Literal["training", "test"]
    done: int
    total: int
    losses: dict[str, float] = field(default_factory=dict)


#: Takes what a contender says of its progress.
Report = Callable[[Progress], object]

DRAFTED_COMMANDS = 25
"""How many commands of the test split drafting is timed on."""

SHADOW_NAME, DETACHED_NAME, LORA_NAME, BASE_NAME = "base + shadow", "detached shadow", "LoRA", "bare base"

#: The adapter around the pretrained shadow, chosen on the dev split (LOG.md).
SHADOW = ShadowConfig(variant="readout", injection_hidden_size=38, output_hidden_size=20)


@dataclass(frozen=True)
class RaceSettings:
    """All settings of a race; learning rates, dropouts and sizes were chosen on the dev split (LOG.md).

    Args:
        base: folder of the base and its tokenizer.
        shadow_model: folder of the pretrained shadow, which shares the base's embeddings.
        steps: optimizer steps of each contender.
        batch: commands per step.
        test_commands: number of scored commands of the test split.
        shadow: config of the adapter around the shadow.
        shadow_loss_weight: weight of the shadow's own loss.
        shadow_learning_rate, lora_learning_rate: peak learning rates.
        shadow_learning_rate_scale: rate of the pretrained backbone, in units of the shadow's.
        seed: seed of commands, weights and order.
    """

    base: Path = BASE_PATH
    shadow_model: Path = SHADOW_PATH
    steps: int = 700
    batch: int = 8
    test_commands: int = 300
    shadow: ShadowConfig = SHADOW
    shadow_loss_weight: float = 1.0
    shadow_learning_rate: float = 2e-3
    shadow_learning_rate_scale: float = 0.3
    lora_learning_rate: float = 1.25e-3
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """Cost of training one contender: parameters, seconds, MB (10^6 bytes), and its loss curves by name."""

    trainable: int
    seconds: float
    peak_memory_mb: float
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Contender:
    """One row of the table; `training` is None for a model that was not trained here, `drafting` where nothing drafts."""

    name: str
    scores: Scores
    training: Training | None = None
    drafting: Drafting | None = None


def race_shadow(settings: RaceSettings, output: Path, report: Report) -> list[Contender]:
    """Train base + shadow, save adapter and exported shadow below `output`, and score both."""
    _limit_threads_and_output()
    tokenizer, base = load_tokenizer(settings.base), load_base(settings.base)
    set_seed(settings.seed)
    adapted = get_shadow_model(base, settings.shadow, shadow_model=load_shadow(settings.shadow_model))
    model = ShadowForCausalLM(adapted, shadow_loss_weight=settings.shadow_loss_weight)
    scale = settings.shadow_learning_rate_scale
    trainer_class = partial(ShadowSFTTrainer, shadow_learning_rate_scale=scale)
    rate = settings.shadow_learning_rate
    training = _train(trainer_class, model, tokenizer, settings, rate, _Reporter(SHADOW_NAME, report))
    for folder, part in (("adapter", model), ("shadow", model.export_shadow())):
        part.save_pretrained(output / folder)
        tokenizer.save_pretrained(output / folder)
    detached = AutoModelForCausalLM.from_pretrained(output / "shadow", local_files_only=True)
    test = _test(settings)
    attached_scores = score(model, tokenizer, test, _answered(SHADOW_NAME, report))
    detached_scores = score(detached, tokenizer, test, _answered(DETACHED_NAME, report))
    drafting = measure_drafting(model, base, tokenizer, test[:DRAFTED_COMMANDS])
    return [
        Contender(SHADOW_NAME, attached_scores, training, drafting),
        Contender(DETACHED_NAME, detached_scores),
    ]


def race_lora(settings: RaceSettings, budget: int, report: Report) -> list[Contender]:
    """Train LoRA on every linear layer with about `budget` parameters and score it."""
    _limit_threads_and_output()
    tokenizer, base = load_tokenizer(settings.base), load_base(settings.base)
    set_seed(settings.seed)
    rank = lora_rank(base, budget)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    training = _train(SFTTrainer, model, tokenizer, settings, settings.lora_learning_rate, _Reporter(LORA_NAME, report))
    scores = score(model, tokenizer, _test(settings), _answered(LORA_NAME, report))
    return [Contender(f"{LORA_NAME} (rank {rank})", scores, training)]


def race_base(settings: RaceSettings, report: Report) -> list[Contender]:
    """Score the bare base."""
    _limit_threads_and_output()
    tokenizer, base = load_tokenizer(settings.base), load_base(settings.base)
    return [Contender(BASE_NAME, score(base, tokenizer, _test(settings), _answered(BASE_NAME, report)))]


def shadow_size(settings: RaceSettings) -> int:
    """Number of trainable parameters of base + shadow, which is LoRA's budget."""
    shadow = load_shadow(settings.shadow_model)
    return _trainable(get_shadow_model(load_base(settings.base), settings.shadow, shadow_model=shadow))


def lora_rank(base: PreTrainedModel, budget: int) -> int:
    """The rank at which LoRA on every linear layer except the head is closest to `budget` parameters."""
    head = base.get_output_embeddings()
    linears = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
    return max(1, round(budget / sum(m.in_features + m.out_features for m in linears)))


class _Reporter(TrainerCallback):
    """Reports the losses of every entry of the log."""

    def __init__(self, name: str, report: Report) -> None:
        self.name = name
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One report, but not of the summary at the end."""
        if "loss" not in logs:
            return
        losses = {"loss": logs.get("base_loss", logs["loss"])}
        if "shadow_loss" in logs:
            losses["detached"] = logs["shadow_loss"]
        self.report(Progress(self.name, "training", state.global_step, state.max_steps, losses))


def _answered(name: str, report: Report) -> Callable[[int, int], object]:
    """What takes how many of the test's commands are answered."""
    return lambda done, total: report(Progress(name, "test", done, total))


def _train(
    trainer_class: Any,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: RaceSettings,
    rate: float,
    reporter: _Reporter,
) -> Training:
    """Train a contender; only the learning rate and the class of the trainer differ between contenders."""
    data = Dataset.from_list([c.row() for c in commands("train", settings.steps * settings.batch, settings.seed)])
    with TemporaryDirectory() as folder:  # a trainer makes one, though nothing is saved there
        arguments = _arguments(settings, rate, folder)
        trainer = trainer_class(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(reporter)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return Training(_trainable(model), seconds, peak_memory_mb(), _curves(trainer.state.log_history))


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _arguments(settings: RaceSettings, rate: float, folder: str) -> SFTConfig:
    return SFTConfig(
        output_dir=folder, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        activation_checkpointing=False, max_steps=settings.steps, per_device_train_batch_size=settings.batch,
        learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=settings.steps // 20, weight_decay=0.0,
        logging_steps=max(1, settings.steps // 50), max_length=None, seed=settings.seed, data_seed=settings.seed,
        disable_tqdm=True,
    )  # fmt: skip


def _curves(history: list[dict[str, float]]) -> dict[str, Curve]:
    """The training loss of the adapted model, and of the shadow alone where there is one."""
    rows = [row for row in history if "loss" in row]
    curves = {"answer": [(int(row["step"]), float(row.get("base_loss", row["loss"]))) for row in rows]}
    if any("shadow_loss" in row for row in rows):
        curves["detached shadow"] = [(int(row["step"]), float(row["shadow_loss"])) for row in rows]
    return curves


def _test(settings: RaceSettings) -> list[Command]:
    return commands("test", settings.test_commands, settings.seed)


def _limit_threads_and_output() -> None:
    """Use half of the cores; libraries print no bars and no warnings. Peft uses a deprecated name of transformers."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_bars_of_datasets()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
