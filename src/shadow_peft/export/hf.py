"""Writes an exported shadow as a folder of transformers: model, tokenizer with chat template, generation config, card."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.backbone.projected_lm import AutoModelForCausalLMWithHiddenProjection
from shadow_peft.base.quantization import quantization_method
from shadow_peft.storage.atomic import all_or_none
from shadow_peft.storage.versions import versions_of

CARD = "README.md"
MARK = "shadow-peft export"
"""Stands in every card of an export, so that a later one knows it."""

_PACKAGES = ("shadow-peft", "torch", "transformers")
_WRITTEN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt"
    r"|(tokenizer|spiece)\.model|additional_chat_templates|chat_template\.jinja|model\b.*\.safetensors(\.index\.json)?|README\.md"
    r"|model-\w+\.gguf|model\.onnx(_data)?|openvino_model\.(xml|bin)|model\.(pte|html)|export\.json"
)


@dataclass(frozen=True)
class Origin:
    """Where an exported shadow comes from.

    Attributes:
        adapter: folder or hub id of the adapter, or of the model that was folded.
        base: folder or hub id of the base, or None where it is not known.
        variant: of the adapter, or None.
        base_parameters: number of parameters of the base, or None.
    """

    adapter: str
    base: str | None = None
    variant: str | None = None
    base_parameters: int | None = None


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, origin: Origin) -> None:
    """Write all files or none; those of an earlier export in the folder are replaced."""
    with replacing(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        card(model, origin, folder.name).save(staging / CARD)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A staging folder whose files appear in `folder` together at the end, in the place of those of an earlier export."""
    old = [path.name for path in folder.iterdir() if _WRITTEN.fullmatch(path.name)] if folder.is_dir() else []
    with all_or_none(folder, removing=old) as staging:
        yield staging


def what_else_is_in(folder: Path) -> str | None:
    """The name of something in a folder that no export has written; None where there is nothing but an export."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    found = folder / CARD
    if not found.is_file() or MARK not in found.read_text(encoding="utf-8", errors="replace"):
        return sorted(path.name for path in folder.iterdir())[0]
    return next((path.name for path in sorted(folder.iterdir()) if not _WRITTEN.fullmatch(path.name)), None)


def card(model: PreTrainedModel, origin: Origin, name: str, usage: str | None = None, to: str = "hf") -> ModelCard:
    """The model card: what it is, how it is used, where it comes from.

    Args:
        model: what was exported.
        origin: where it comes from.
        name: of the folder.
        usage: Markdown; None for a folder of transformers.
        to: the format.
    """
    is_classifier = model.get_output_embeddings() is None
    task = "text-classification" if is_classifier else "text-generation"
    base = None if origin.base is None or Path(origin.base).exists() else origin.base
    data = ModelCardData(
        base_model=base, library_name="transformers" if to == "hf" else to, pipeline_tag=task, tags=["shadowpeft"]
    )
    base_name = None if origin.base is None else Path(origin.base).name
    adapter = Path(origin.adapter).name
    rows = {
        "class": f"`{type(model).__name__}`",
        "parameters": f"{model.num_parameters():,}",
        "parameters of the base": None if origin.base_parameters is None else f"{origin.base_parameters:,}",
        "base": None if base_name is None else f"`{base or base_name}`",
        "variant": None if origin.variant is None else f"`{origin.variant}`",
        "python": platform.python_version(),
        **versions_of(_PACKAGES),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value is not None)])
    form = _needs(model) if to == "hf" else f"It is a stock `{type(model).__name__}` of transformers, exported to {to}."
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {f'Shadow of {base_name}' if base_name else name}\n\n"
        f"A small model that was trained as the shadow of {f'`{base_name}`' if base_name else 'a larger one'} by ShadowPEFT "
        f"and detached from it. {form}\n\n"
        f"## Use\n\n{usage or _usage(is_classifier, name, _is_projected(model))}\n\n"
        f"## Provenance\n\nMade by `{MARK} {adapter}{'' if to == 'hf' else f' --to {to}'}`.\n\n{table}\n"
    )


def _is_projected(model: PreTrainedModel) -> bool:
    return isinstance(model, AutoModelForCausalLMWithHiddenProjection)


def _needs(model: PreTrainedModel) -> str:
    """What a folder of transformers is, and what loading it needs."""
    kind, method = type(model).__name__, quantization_method(model)
    packages = [*["shadow-peft"] * _is_projected(model), *([] if method is None else [method])]
    what = f"an `{kind}`" if _is_projected(model) else f"a stock `{kind}` of transformers"
    if not packages:
        return f"It is {what}; no other package is needed."
    return f"It is {what}; loading it needs {' and '.join(f'`{package}`' for package in packages)}."


def _usage(is_classifier: bool, name: str, is_projected: bool) -> str:
    package = "import shadow_peft  # brings the class\n" if is_projected else ""
    auto, ending = ("AutoModelForCausalLM", _GENERATE)
    if is_classifier:
        auto, ending = ("AutoModelForSequenceClassification", _CLASSIFY)
    return f"""```python
{package}from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}")
inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
{ending}
```"""


_GENERATE = """output = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""

_CLASSIFY = "print(model.config.id2label[int(model(**inputs).logits.argmax())])"
