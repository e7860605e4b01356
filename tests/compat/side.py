"""One side of the comparison: save adapters with what they compute, or load the other side's and compare.

    python tests/compat/side.py save ours|peer FOLDER [CASE ...]
    python tests/compat/side.py load ours|peer FOLDER [CASE ...]

Runs as it is in both environments, by the names that both packages have: `shadow_peft` (this library there, the published
0.1.x here), and for the paper's dialect `shadow_peft` on one side and `peft` on the other. `load` prints one line of JSON:
case -> output -> largest difference, or the error.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

VOCABULARY, LABELS = 96, 3
LLAMA_SIZES = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ADAPTER = {"injection_hidden_size": 8, "gate_hidden_size": 6, "alpha": 0.7, "dropout": 0.0}

CASES: dict[str, dict[str, Any]] = {
    "llama, implicit": {"base": ("Llama", "CausalLM"), "config": {"num_shadow_layers": 2}},
    "llama, narrow MLP and heads": {
        "base": ("Llama", "CausalLM"),
        "config": {
            "shadow_intermediate_size": 24,
            "shadow_num_attention_heads": 2,
            "shadow_num_key_value_heads": 1,
            "shadow_head_dim": 8,
        },
    },
    "qwen3, explicit, projected": {"base": ("Qwen3", "CausalLM"), "shadow_width": 16},
    "qwen3, classification": {"base": ("Qwen3", "SequenceClassification")},
    "qwen3, both heads saved": {"base": ("Qwen3", "CausalLM"), "config": {"modules_to_save": ["lm_head", "shadow_lm_head"]}},
    "gpt2, implicit": {"base": ("GPT2", "CausalLM")},
    "llama, not of 0.1.x": {"base": ("Llama", "CausalLM"), "config": {"variant": "readout"}, "refused": True},
    "peft: llama, mirror": {"base": ("Llama", "CausalLM"), "peft": {}},
    "peft: llama, narrow mirror": {
        "base": ("Llama", "CausalLM"),
        "peft": {"shadow_hidden_size": 16, "shadow_num_hidden_layers": 2},
    },
    "peft: llama, own embeddings": {
        "base": ("Llama", "CausalLM"),
        "peft": {"share_embeddings": False},
        "saved_by": "peer",  # here, such a shadow is only made by loading one
    },
}


def make_base(family: str, task: str, width: int = 32, layers: int = 4) -> PreTrainedModel:
    """A random model of a few thousand parameters."""
    if family == "GPT2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    else:
        sizes = {**LLAMA_SIZES, "hidden_size": width, "num_hidden_layers": layers, "head_dim": 8}
    labels = {"num_labels": LABELS} if task == "SequenceClassification" else {}
    config = getattr(transformers, f"{family}Config")(**sizes, **IDS, **labels)
    model: PreTrainedModel = getattr(transformers, f"{family}For{task}" if family != "GPT2" else "GPT2LMHeadModel")(config)
    return model.eval()


def make_shadow(base: PreTrainedModel, width: int) -> PreTrainedModel:
    """A small Qwen3 under the base's head."""
    from shadow_peft import AutoModelForCausalLMWithHiddenProjection

    small = make_base("Qwen3", "CausalLM", width, layers=2)
    wrapped: PreTrainedModel = AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small,
        shadow_hidden_projection=torch.nn.Linear(width, base.config.hidden_size, bias=False),
        lm_head=base.lm_head,
        init_optimal_projection=True,
        reference_lm_head=small.lm_head,
    )
    return wrapped


def batch(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Three rows, two of them padded on the right, and labels."""
    input_ids = torch.randint(3, VOCABULARY, (3, 10))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = attention_mask[2, 9:] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, 0)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    if case["base"][1] == "SequenceClassification":
        labels = torch.randint(LABELS, (3,))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def train_a_little(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A few large steps, so that every trained tensor leaves its starting point."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    model.train()
    for _ in range(4):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# ------------------------------------------------------------------ shadow_peft, on both sides


def task_class(case: dict[str, Any]) -> Any:
    """The task model of a case."""
    import shadow_peft

    return getattr(shadow_peft, f"ShadowFor{case['base'][1]}")


def save_native(side: str, case: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and save an adapter with `shadow_peft`; the inputs, and what the model computes of them."""
    from shadow_peft import ShadowConfig, get_shadow_model

    base, shadow = make_base(*case["base"]), None
    base.save_pretrained(folder / "base")
    if "shadow_width" in case:
        shadow = make_shadow(base, case["shadow_width"])
        shadow.save_pretrained(folder / "shadow_model")
    paper = {"variant": "peft", **paper_names(case["peft"])} if "peft" in case else {}
    published = {"variant": "published"} if side == "ours" else {}  # 0.1.x has no other
    config = ShadowConfig(**{**ADAPTER, **published, **case.get("config", {}), **paper})
    adapted = get_shadow_model(base, config, shadow_model=shadow)
    model = task_class(case)(adapted)
    inputs = batch(case)
    train_a_little(model, inputs)
    options = {"include_shared_embeddings": True} if side == "ours" and case["base"][0] == "GPT2" else {}
    model.save_pretrained(folder / "adapter", **options)
    expected = computed(model, inputs)
    if exports(side, case):
        adapted.export_shadow().save_pretrained(folder / "exported")
        expected["exported"] = expected["shadow_logits"].clone()
    return inputs, expected


def load_native(case: dict[str, Any], folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an adapter computes that is loaded with `shadow_peft`."""
    from shadow_peft import AutoModelForCausalLMWithHiddenProjection

    auto = AutoModelForCausalLM if case["base"][1] == "CausalLM" else AutoModelForSequenceClassification
    shadow = None
    if (folder / "shadow_model").is_dir():
        shadow = AutoModelForCausalLMWithHiddenProjection.from_pretrained(folder / "shadow_model")
    base = auto.from_pretrained(folder / "base")
    model = task_class(case).from_pretrained(base, str(folder / "adapter"), shadow_model=shadow)
    seen = computed(model.eval(), inputs)
    if (folder / "exported").is_dir():
        seen["exported"] = computed(AutoModelForCausalLM.from_pretrained(folder / "exported"), inputs, ("logits",))["logits"]
    return seen


@torch.no_grad()
def computed(
    model: Any, inputs: dict[str, torch.Tensor], names: tuple[str, ...] = ("logits", "shadow_logits", "loss")
) -> dict[str, torch.Tensor]:
    """What a model computes of the inputs."""
    outputs = model(**inputs)
    return {name: outputs[name].contiguous().clone() for name in names}


def exports(side: str, case: dict[str, Any]) -> bool:
    """Whether the exported shadow is exchanged too; that of shadow-peft 0.1.1 leaves a trained shadow head out."""
    trained_head = "shadow_lm_head" in case.get("config", {}).get("modules_to_save", [])
    return case["base"][1] == "CausalLM" and "peft" not in case and not (side == "peer" and trained_head)


# ------------------------------------------------------------------ the paper's dialect, with peft on the other side


def paper_names(options: dict[str, Any]) -> dict[str, Any]:
    """peft's names of an option -> ours."""
    names = {"shadow_num_hidden_layers": "num_shadow_layers"}
    return {names.get(name, name): value for name, value in options.items()}


def save_peft(case: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and save an adapter with peft's tuner."""
    from peft import ShadowConfig, get_peft_model

    base = make_base(*case["base"])
    base.save_pretrained(folder / "base")
    config = ShadowConfig(
        task_type="CAUSAL_LM", r=8, update_hidden_size=6, shadow_alpha=0.7, shadow_dropout=0.0, **case["peft"]
    )
    model = get_peft_model(base, config)
    inputs = batch(case)
    train_a_little(model, inputs)
    model.save_pretrained(folder / "adapter")
    return inputs, computed_by_peft(model, inputs)


def load_peft(case: dict[str, Any], folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an adapter computes that is loaded with peft."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter"))
    return computed_by_peft(model.eval(), inputs)


@torch.no_grad()
def computed_by_peft(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits and loss; the shadow's logits from the parts that the tuner shows."""
    outputs, tuner = model(**inputs), model.base_model
    backbone, mask = tuner.shadow_backbone["default"], inputs["attention_mask"]
    if hasattr(backbone, "embed_tokens"):  # a mirror of another width has a table of its own
        tokens = {"input_ids": inputs["input_ids"]}
    else:
        tokens = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    state = tuner.shadow_projection["default"](backbone(**tokens, attention_mask=mask)[0])
    shadow_logits = model.get_output_embeddings()(state)
    return {"logits": outputs.logits, "shadow_logits": shadow_logits, "loss": outputs.loss}


# ------------------------------------------------------------------ verbs


def save(side: str, root: Path, names: list[str]) -> None:
    """Write every case below `root`."""
    for index, name in enumerate(CASES):
        if name not in names or CASES[name].get("saved_by", side) != side or (side == "peer" and "refused" in CASES[name]):
            continue
        torch.manual_seed(index)
        folder, case = root / str(index), CASES[name]
        folder.mkdir(parents=True)
        inputs, outputs = save_peft(case, folder) if by_peft(side, case) else save_native(side, case, folder)
        save_file(inputs, folder / "inputs.safetensors")
        save_file({key: value.contiguous() for key, value in outputs.items()}, folder / "expected.safetensors")


def load(side: str, root: Path, names: list[str]) -> dict[str, dict[str, float] | str]:
    """Case -> output -> largest difference, or the error."""
    results: dict[str, dict[str, float] | str] = {}
    for index, name in enumerate(CASES):
        folder, case = root / str(index), CASES[name]
        if name not in names or not folder.exists():
            continue
        inputs, expected = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "expected"))
        try:
            seen = (load_peft if by_peft(side, case) else load_native)(case, folder, inputs)
            results[name] = {key: float((seen[key] - value).abs().max()) for key, value in expected.items()}
            if "refused" in case:
                results[name] = "loaded, though this package cannot compute it"
        except Exception as error:  # any failure of the other side is a result of the comparison
            results[name] = f"{type(error).__name__}: {error}"
            if "refused" in case:
                results[name] = {f"refused ({type(error).__name__})": 0.0}
            else:
                traceback.print_exc()
    return results


def by_peft(side: str, case: dict[str, Any]) -> bool:
    """Whether this side handles a case with peft."""
    return side == "peer" and "peft" in case


def main() -> None:
    """The command line."""
    verb, side, root, *names = sys.argv[1:]
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if verb == "save":
        save(side, Path(root), names or list(CASES))
    else:
        print(json.dumps(load(side, Path(root), names or list(CASES))))


if __name__ == "__main__":
    main()
