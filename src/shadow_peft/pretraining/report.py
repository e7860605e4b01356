"""What is told of a pretraining beside the weights: the loss curve as JSON and as a picture, and the model card."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from shadow_peft.backbone.projection import Reconstruction
from shadow_peft.pretraining.corpus import files_of
from shadow_peft.storage.files import write_json
from shadow_peft.storage.versions import versions_of
from shadow_peft.training.card import CARD, PICTURE, LogRow, draw_losses, loss_curves, portable

REPORT = "pretraining.json"
PACKAGES = ("shadow-peft", "torch", "transformers", "datasets", "trl")


@dataclass(frozen=True)
class PretrainingFacts:
    """The facts about a run.

    Attributes:
        base: folder or hub id of the base.
        small: folder or hub id of the small model that the shadow was; None for layers of the base.
        data: places of the text.
        licence: that of the text, as it was given.
        options: all options, by name.
        arguments: those of `shadow-peft pretrain`, which made the run.
        trained: number of trained parameters.
        tokens_per_step: tokens of one optimizer step.
        seconds: duration of the training.
        fit: how well a projection was fitted before the training.
        shares_embeddings: whether the shadow reads the base's embeddings.
    """

    base: str
    small: str | None
    data: Sequence[str]
    licence: str | None
    options: Mapping[str, Any]
    arguments: Sequence[str]
    trained: int
    tokens_per_step: int
    seconds: float
    fit: Reconstruction | None
    shares_embeddings: bool


def fit_in_words(fit: Reconstruction) -> str:
    """How well a projection was fitted, in one line."""
    error, explained = f"relative error {fit.relative_error:.3g}", f"explained variance {fit.explained_variance:.1%}"
    return f"fitted to the small model's head: {error}, {explained}"


def next_command(base: str, shadow: str, shares_embeddings: bool) -> str:
    """The command that fine-tunes with the finished shadow."""
    share = ["--share_embeddings"] if shares_embeddings else []
    words = ["train", "--model", base, "--shadow_model", shadow, *share, "--data", "data.jsonl", "--output", "out"]
    return shlex.join(["shadow-peft", *words])


def write_report(output: Path, facts: PretrainingFacts, log: Sequence[LogRow]) -> None:
    """Write `pretraining.json`, `losses.png` and `README.md` into the folder of the finished model."""
    curves = loss_curves(log)
    if curves:
        draw_losses(output / PICTURE, curves)
    options = {name: _portable(value) for name, value in facts.options.items()}
    write_json({"options": options, "facts": _facts(facts, log), "curves": curves}, output / REPORT)
    ModelCard(f"---\n{_card_data(facts).to_yaml()}\n---\n\n{_text(facts, log, bool(curves))}").save(output / CARD)


def _portable(value: Any) -> Any:
    """The value of an option without the folders of one machine."""
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return portable(value) if isinstance(value, str) else value


def _facts(facts: PretrainingFacts, log: Sequence[LogRow]) -> dict[str, Any]:
    steps = max((int(row["step"]) for row in log), default=0)
    return {
        "trained_parameters": facts.trained,
        "steps": steps,
        "tokens": steps * facts.tokens_per_step,
        "seconds": round(facts.seconds),
        "projection": None if facts.fit is None else facts.fit._asdict(),
        "command": shlex.join(["shadow-peft", "pretrain", *map(portable, facts.arguments)]),
        "python": platform.python_version(),
        **versions_of(PACKAGES),
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
    if facts.fit is not None:
        figures["projection"] = fit_in_words(facts.fit)
    provenance = {name: str(known[name]) for name in ("python", *PACKAGES)}
    return "\n\n".join(
        [
            f"# A shadow for {Path(base).name}",
            f"{_origin(facts)} It answers alone, and it is a starting point for ShadowPEFT.",
            f"## Use\n\n```bash\n{next_command(base, 'FOLDER', facts.shares_embeddings)}\n```",
            f"## Data\n\n{_data(facts)}",
            f"## Figures\n\n{_table(figures)}",
            *([f"![losses over the steps]({PICTURE})"] if has_picture else []),
            f"## Provenance\n\n```bash\n{known['command']}\n```\n\n{_table(provenance)}\n",
        ]
    )


def _origin(facts: PretrainingFacts) -> str:
    base = portable(facts.base)
    if facts.small is not None:
        return f"The small language model `{portable(facts.small)}` under the head of `{base}`, trained on text."
    return f"A small language model made of layers of `{base}`, with its head, trained on text."


def _data(facts: PretrainingFacts) -> str:
    """The files of the text with their sizes, and its licence."""
    files = [file for place in facts.data for file in files_of(place)]
    rows = {f"`{file.name}`": f"{file.stat().st_size / 1e6:,.1f} MB" for file in files}
    listed = _table(rows) if rows else ", ".join(f"`{place}`" for place in facts.data) + "."
    return f"{listed}\n\nLicence of the text: {facts.licence or 'not given'}."


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
