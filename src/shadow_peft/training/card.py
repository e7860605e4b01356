"""The model card of a run, with data, figures and provenance, and a plot of the losses."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from shadow_peft.storage.versions import versions_of

CARD, PICTURE = "README.md", "losses.png"
PACKAGES = ("shadow-peft", "torch", "transformers", "trl", "peft", "accelerate", "datasets")

LogRow = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run that are known before it starts.

    Attributes:
        name: name of the adapter: a folder, beside which the commands run, or a hub id.
        method: "ShadowPEFT", "LoRA", "DoRA".
        variant: of a shadow adapter, None for another.
        base: folder or hub id of the base.
        data: folder, file or hub id of the data.
        parts: which parts of it were used for training and evaluation, such as "split train".
        examples: purpose ("training", "evaluation") -> number of examples.
        trainable: number of trainable parameters.
        seed: seed of weights and order.
        arguments: the arguments of `shadow-peft train`, which made the run.
        processes: number of processes.
        chat: whether prompts are a user's turns.
        quantization: options of the command line that quantized the base; empty if none did.
        class_names: of a classifier, in the order of its logits.
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
    quantization: str = ""
    class_names: tuple[str, ...] = ()


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
    base = None if Path(facts.base).exists() else facts.base
    data = ModelCardData(
        base_model=base,
        datasets=None if Path(facts.data).exists() else [facts.data],
        library_name="shadow-peft" if facts.method == "ShadowPEFT" else "peft",
        pipeline_tag="text-generation" if not facts.class_names else "text-classification",
        tags=[facts.method.lower(), *(("trl", "sft") if not facts.class_names else ())],
    )
    if base is not None:
        data["base_model_relation"] = "adapter"
    return data


def _text(facts: RunFacts, log: Sequence[LogRow], has_picture: bool) -> str:
    examples = ", ".join(f"{count:,} {purpose}" for purpose, count in facts.examples.items())
    figures = {"trainable parameters": f"{facts.trainable:,}", **_figures(log)}
    base, method = portable(facts.base), facts.method + (f", variant `{facts.variant}`" if facts.variant else "")
    classes = ", ".join(f"`{name}`" for name in facts.class_names)
    learned = f"to tell the classes {classes} apart" if classes else "by supervised fine-tuning"
    provenance = {
        "base": f"`{base}`" + (f", `{facts.quantization}`" if facts.quantization else ""),
        "method": method,
        "seed": str(facts.seed),
        "processes": str(facts.processes),
        "python": platform.python_version(),
        **versions_of(PACKAGES),
    }
    command = shlex.join(["shadow-peft", "train", *map(portable, facts.arguments)])
    return "\n\n".join(
        [
            f"# {Path(base).name} with a {facts.method} adapter",
            f"An adapter of `{base}`, trained with {method}, {learned}. The base itself is as it was.",
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
    """The last value of every metric of training and evaluation."""
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
    if facts.class_names:
        return _classifier_usage(facts)
    chat = '[{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"'
    inputs = f"tokenizer.apply_chat_template({chat})" if facts.chat else 'tokenizer("Hello", return_tensors="pt")'
    if facts.method == "ShadowPEFT":
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\nfrom shadow_peft import ShadowForCausalLM"
        attach = f'ShadowForCausalLM.from_pretrained(base, "{facts.name}")'
        place = f"--adapter {facts.name}"
    else:
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
        attach, place = f'PeftModel.from_pretrained(base, "{facts.name}")', f"--model {facts.name}"
    if facts.quantization:
        imports = imports.replace("AutoTokenizer", "AutoTokenizer, BitsAndBytesConfig")
    python = f"""{imports}

tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
base = AutoModelForCausalLM.from_pretrained("{base}"{_quantized(facts.quantization)})
model = {attach}
inputs = {inputs}
output = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
    options = " ".join(filter(None, (place, facts.quantization, "--chat" * facts.chat)))
    command = f'shadow-peft generate {options} "Hello"'
    return f"```python\n{python}\n```\n\n```bash\n{command}\n```{_of_the_shadow(facts)}"


def _of_the_shadow(facts: RunFacts) -> str:
    """What a shadow can do beside correcting its base; nothing of another adapter."""
    if facts.method != "ShadowPEFT":
        return ""
    alone = "With `--draft` the shadow drafts for its base (`use_shadow_draft=True`); with `--shadow_only` it answers alone."
    exported = "The folder `shadow` holds it as a model of its own, which needs no base."
    return f"\n\n{alone}" + (f"\n{exported}" if "--export" in facts.arguments else "")


def _classifier_usage(facts: RunFacts) -> str:
    """The same for a classifier."""
    if facts.method == "ShadowPEFT":
        auto, package, more = "AutoShadowModelForSequenceClassification", "shadow_peft", _quantized(facts.quantization)
        options = f"--adapter {facts.name}" + f" {facts.quantization}" * bool(facts.quantization)
        command = f'\n\n```bash\nshadow-peft classify {options} "Hello"\n```'
    else:
        auto, package, more = "AutoPeftModelForSequenceClassification", "peft", f", num_labels={len(facts.class_names)}"
        more += _quantized(facts.quantization)
        command = ""
    names = "AutoTokenizer, BitsAndBytesConfig" if "BitsAndBytes" in more else "AutoTokenizer"
    python = f"""from {package} import {auto}
from transformers import {names}

tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
model = {auto}.from_pretrained("{facts.name}"{more})
logits = model(**tokenizer("Hello", return_tensors="pt")).logits
print({list(facts.class_names)}[logits[0].argmax()])"""
    return f"```python\n{python}\n```{command}"


def _quantized(options: str) -> str:
    """The argument of `from_pretrained` that quantizes a base as these options of the command line do."""
    if not options:
        return ""
    given = ["load_in_8bit=True" if "--load_in_8bit" in options else "load_in_4bit=True"]
    if "--load_in_4bit" in options:
        given.append(f'bnb_4bit_quant_type="{"fp4" if "fp4" in options else "nf4"}"')
        given += ["bnb_4bit_use_double_quant=True"] * ("--use_bnb_nested_quant" in options)
    return f", quantization_config=BitsAndBytesConfig({', '.join(given)})"
