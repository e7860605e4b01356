"""What is told of a pretraining beside the weights: the loss curve as JSON and as a picture, and the model card."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from shadow_peft.storage.files import write_json
from shadow_peft.training.card import CARD, PICTURE, LogRow, draw_losses, loss_curves, portable

REPORT = "pretraining.json"
PACKAGES = ("shadow-peft", "torch", "transformers", "datasets", "trl")


@dataclass(frozen=True)
class PretrainingFacts:
    """The facts about a run.

    Attributes:
        base: folder or hub id of the base.
        data: places of the text.
        options: all options, by name.
        arguments: those of `shadow-peft pretrain`, which made the run.
        trained: number of trained parameters.
        tokens_per_step: tokens of one optimizer step.
        seconds: duration of the training, of the last process alone where it was resumed.
    """

    base: str
    data: Sequence[str]
    options: Mapping[str, Any]
    arguments: Sequence[str]
    trained: int
    tokens_per_step: int
    seconds: float


def write_report(output: Path, facts: PretrainingFacts, log: Sequence[LogRow]) -> None:
    """Write `pretraining.json`, `losses.png` and `README.md` into the folder of the finished model."""
    curves = loss_curves(log)
    if curves:
        draw_losses(output / PICTURE, curves)
    write_json({"options": dict(facts.options), "facts": _facts(facts, log), "curves": curves}, output / REPORT)
    ModelCard(f"---\n{_card_data(facts).to_yaml()}\n---\n\n{_text(facts, log, bool(curves))}").save(output / CARD)


def _facts(facts: PretrainingFacts, log: Sequence[LogRow]) -> dict[str, Any]:
    steps = max((int(row["step"]) for row in log), default=0)
    return {
        "trained_parameters": facts.trained,
        "steps": steps,
        "tokens": steps * facts.tokens_per_step,
        "seconds": round(facts.seconds),
        "command": shlex.join(["shadow-peft", "pretrain", *map(portable, facts.arguments)]),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _card_data(facts: PretrainingFacts) -> ModelCardData:
    base = None if Path(facts.base).exists() else facts.base
    return ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=["shadow-peft", "pretraining"]
    )


def _text(facts: PretrainingFacts, log: Sequence[LogRow], has_picture: bool) -> str:
    base, known = portable(facts.base), _facts(facts, log)
    held_out = [row["eval_loss"] for row in log if "eval_loss" in row]
    figures = {"trained parameters": f"{facts.trained:,}", "steps": f"{known['steps']:,}", "tokens": f"{known['tokens']:,}"}
    if held_out:
        figures["held-out loss, nats per token"] = f"{held_out[0]:.4g} at first, {held_out[-1]:.4g} at last"
    provenance = {name: str(known[name]) for name in ("python", *PACKAGES)}
    return "\n\n".join(
        [
            f"# A shadow for {Path(base).name}",
            f"A small language model cut from `{base}`, whose embeddings and head it shares, and trained on text. "
            "It answers alone, and it is a starting point for ShadowPEFT.",
            f"## Use\n\n```bash\nshadow-peft train --model {base} --shadow_model FOLDER --share_embeddings "
            "--data data.jsonl --output out\n```",
            f"## Data\n\n{', '.join(f'`{portable(place)}`' for place in facts.data)}.",
            f"## Figures\n\n{_table(figures)}",
            *([f"![losses over the steps]({PICTURE})"] if has_picture else []),
            f"## Provenance\n\n```bash\n{known['command']}\n```\n\n{_table(provenance)}\n",
        ]
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
