"""The model card of a run, with data, figures and provenance, and a plot of the losses."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD, PICTURE = "README.md", "losses.png"
PACKAGES = ("shadow-peft", "torch", "transformers", "trl", "peft", "accelerate", "datasets")

LogRow = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run that are known before it starts.

    Attributes:
        name: name of the model, for the title.
        method: "ShadowPEFT", "LoRA", "DoRA".
        base: folder or hub id of the base.
        data: folder, file or hub id of the data.
        parts: which parts of it were used for training and evaluation, such as "split train".
        examples: purpose ("training", "evaluation") -> number of examples.
        trainable: number of trainable parameters.
        seed: seed of weights and order.
        command: the command that made the run.
        processes: number of processes.
        quantization: options of the command line that quantized the base; empty if none did.
    """

    name: str
    method: str
    base: str
    data: str
    parts: str
    examples: dict[str, int]
    trainable: int
    seed: int
    command: str
    processes: int = 1
    quantization: str = ""


def write_card(directory: Path, facts: RunFacts, log: Sequence[LogRow]) -> None:
    """Write `README.md` into a directory and, if something was logged, `losses.png`.

    Args:
        directory: created when it is missing.
        facts: the facts about the run.
        log: rows of a trainer's `state.log_history`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    curves = loss_curves(log)
    if curves:
        draw_losses(directory / PICTURE, curves)
    ModelCard(f"---\n{_card_data(facts).to_yaml()}\n---\n\n{_text(facts, log, bool(curves))}").save(directory / CARD)


def loss_curves(log: Sequence[LogRow]) -> dict[str, list[tuple[int, float]]]:
    """Name of a loss -> its points (step, nats per token).

    A sum of losses is left out where its terms were logged. Names of evaluation losses begin with `eval_`.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in log:
        for name, value in row.items():
            if name.endswith("loss") and not name.startswith("train_"):
                curves.setdefault(name, []).append((int(row["step"]), float(value)))
    sums = {f"{prefix}loss" for prefix in ("", "eval_") if f"{prefix}shadow_loss" in curves}
    return {name: curve for name, curve in curves.items() if name not in sums}


def draw_losses(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Plot the losses over the steps as PNG, evaluations dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name, curve in curves.items():
        style = "o--" if name.startswith("eval_") else "." if len(curve) == 1 else "-"
        axes.plot(*zip(*curve, strict=True), style, label=name.replace("_", " "), markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)


def _card_data(facts: RunFacts) -> ModelCardData:
    """The card's header; the hub accepts ids there, and no local folders."""
    return ModelCardData(
        base_model=None if Path(facts.base).exists() else facts.base,
        datasets=None if Path(facts.data).exists() else [facts.data],
        library_name="shadow-peft" if facts.method == "ShadowPEFT" else "peft",
        pipeline_tag="text-generation",
        tags=[facts.method.lower(), "trl", "sft"],
    )


def _text(facts: RunFacts, log: Sequence[LogRow], has_picture: bool) -> str:
    examples = ", ".join(f"{count:,} {purpose}" for purpose, count in facts.examples.items())
    figures = {"trainable parameters": f"{facts.trainable:,}", **_figures(log)}
    provenance = {
        "base": f"`{facts.base}`" + (f", `{facts.quantization}`" if facts.quantization else ""),
        "seed": str(facts.seed),
        "processes": str(facts.processes),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    return "\n\n".join(
        [
            f"# {facts.name}",
            f"{facts.base} adapted with {facts.method} by supervised fine-tuning; the base itself is frozen.",
            f"## Data\n\n`{facts.data}`, {facts.parts}: {examples} examples.",
            f"## Figures\n\n{_table(figures)}",
            *([f"![losses over the steps]({PICTURE})"] if has_picture else []),
            f"## Provenance\n\n```bash\n{facts.command}\n```\n\n{_table(provenance)}",
            f"## Use\n\n{_usage(facts)}\n",
        ]
    )


def _figures(log: Sequence[LogRow]) -> dict[str, str]:
    """The last value of every metric of training and evaluation."""
    last: dict[str, Any] = {}
    for row in log:
        last.update(row)
    shown = [name for name in last if name.startswith(("eval_", "train_")) or name.endswith("loss")]
    chosen = ["step", "epoch", *(name for name in shown if not name.endswith(("_per_second", "_runtime")))]
    return {name.replace("_", " "): f"{last[name]:.6g}" for name in chosen if isinstance(last.get(name), (int, float))}


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _usage(facts: RunFacts) -> str:
    if facts.method != "ShadowPEFT":
        return f'```python\nmodel = peft.PeftModel.from_pretrained(base, "{facts.name}")\n```'
    loaded = f" {facts.quantization}" if facts.quantization else ""
    return f'```bash\nshadow-peft generate "..." --model {facts.base} --adapter {facts.name}{loaded}\n```'
