"""What a run leaves behind for its readers: a model card with data, figures and provenance, and a picture of the losses."""

from __future__ import annotations

import platform
import shlex
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
    """What is known of a run before it starts.

    Attributes:
        name: of the adapter, a folder beside which the commands run, or a hub id.
        method: "ShadowPEFT", "LoRA", "DoRA".
        variant: of a shadow adapter, None for another.
        base: folder or hub id of the base.
        data: folder, file or hub id of the data.
        parts: what was learned of it and evaluated on, such as "split train".
        examples: number of examples, by what they are for.
        trainable: number of trainable parameters.
        seed: of weights and order.
        arguments: of `shadow-peft train`, which made the run.
        processes: that shared the work.
        chat: prompts are a user's turns.
    """

    name: str
    method: str
    variant: str | None
    base: str
    data: str
    parts: str
    examples: dict[str, int]
    trainable: int
    seed: int
    arguments: tuple[str, ...]
    processes: int = 1
    chat: bool = False


def write_card(directory: Path, facts: RunFacts, log: Sequence[LogRow]) -> None:
    """Write `README.md` and, once something was logged, `losses.png` into a directory.

    Args:
        directory: created when it is missing.
        facts: what is known of the run.
        log: rows of a trainer's `state.log_history`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    curves = loss_curves(log)
    if curves:
        draw_losses(directory / PICTURE, curves)
    ModelCard(f"---\n{_card_data(facts).to_yaml()}\n---\n\n{_text(facts, log, bool(curves))}").save(directory / CARD)


def loss_curves(log: Sequence[LogRow]) -> dict[str, list[tuple[int, float]]]:
    """Name of a loss -> its (step, nats per token); a sum is left out where its parts are known.

    The losses of evaluations begin with `eval_`.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in log:
        for name, value in row.items():
            if name.endswith("loss") and not name.startswith("train_"):
                curves.setdefault(name, []).append((int(row["step"]), float(value)))
    sums = {f"{prefix}loss" for prefix in ("", "eval_") if f"{prefix}shadow_loss" in curves}
    return {name: curve for name, curve in curves.items() if name not in sums}


def draw_losses(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """The losses over the steps as PNG, evaluations dashed."""
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
    """The card's header; the hub takes ids there, no folders of one machine."""
    base = None if Path(facts.base).exists() else facts.base
    data = ModelCardData(
        base_model=base,
        datasets=None if Path(facts.data).exists() else [facts.data],
        library_name="shadow-peft" if facts.method == "ShadowPEFT" else "peft",
        pipeline_tag="text-generation",
        tags=[facts.method.lower(), "trl", "sft"],
    )
    if base is not None:
        data["base_model_relation"] = "adapter"
    return data


def _text(facts: RunFacts, log: Sequence[LogRow], has_picture: bool) -> str:
    examples = ", ".join(f"{count:,} {purpose}" for purpose, count in facts.examples.items())
    figures = {"trainable parameters": f"{facts.trainable:,}", **_figures(log)}
    base, method = portable(facts.base), facts.method + (f", variant `{facts.variant}`" if facts.variant else "")
    provenance = {
        "base": f"`{base}`",
        "method": method,
        "seed": str(facts.seed),
        "processes": str(facts.processes),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    command = shlex.join(["shadow-peft", "train", *map(portable, facts.arguments)])
    return "\n\n".join(
        [
            f"# {Path(base).name} with a {facts.method} adapter",
            f"An adapter of `{base}`, trained with {method}, by supervised fine-tuning. The base itself is as it was.",
            f"## Use\n\n{_usage(facts, base)}",
            f"## Data\n\n`{portable(facts.data)}`, {facts.parts}: {examples} examples.",
            f"## Figures\n\n{_table(figures)}",
            *([f"![losses over the steps]({PICTURE})"] if has_picture else []),
            f"## Provenance\n\n```bash\n{command}\n```\n\n{_table(provenance)}\n",
        ]
    )


def portable(word: str) -> str:
    """A word of a command without the folders of one machine: of an absolute path, also behind `=`, its last part."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    is_here = path.is_absolute() and path.exists()
    return f"{option}{equals}{path.name if is_here and path.name else value}"


def _figures(log: Sequence[LogRow]) -> dict[str, str]:
    """The last value of everything that training and evaluation measured."""
    last: dict[str, Any] = {}
    for row in log:
        last.update(row)
    shown = [name for name in last if name.startswith(("eval_", "train_")) or name.endswith("loss")]
    chosen = ["step", "epoch", *(name for name in shown if not name.endswith(("_per_second", "_runtime")))]
    return {name.replace("_", " "): f"{last[name]:.6g}" for name in chosen if isinstance(last.get(name), (int, float))}


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _usage(facts: RunFacts, base: str) -> str:
    """What loads the adapter and lets it answer, in Python and on the command line."""
    chat = '[{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"'
    inputs = f"tokenizer.apply_chat_template({chat})" if facts.chat else 'tokenizer("Hello", return_tensors="pt")'
    if facts.method == "ShadowPEFT":
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\nfrom shadow_peft import ShadowForCausalLM"
        attach = f'ShadowForCausalLM.from_pretrained(base, "{facts.name}")'
        place = f"--adapter {facts.name}"
    else:
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
        attach, place = f'PeftModel.from_pretrained(base, "{facts.name}")', f"--model {facts.name}"
    python = f"""{imports}

tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
base = AutoModelForCausalLM.from_pretrained("{base}")
model = {attach}
inputs = {inputs}
output = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
    command = f'shadow-peft generate {place} {"--chat " * facts.chat}"Hello"'
    return f"```python\n{python}\n```\n\n```bash\n{command}\n```"
