"""The Python code on the package page of `shadow-peft` 0.1.1, run as it stands there.

    python -m tests.compat.page                              every run, against this library
    python -m tests.compat.page --peer PYTHON                 and compares what 0.1.1 prints of its trainable parameters
    python tests/compat/page.py run NAME README WORKSPACE     one run, in this process; the last line printed is JSON

The blocks are taken from the README of the source distribution when this runs; none of them is kept here. Only names of
models and paths are replaced: by tiny random models of the widths that the page names, and by folders in a temporary one.
The hub is one on this machine. Where the page has a slip, `REPAIRS` says which.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "0.1.1"
VOCABULARY = 128
TOKEN = "hf_test"

BLOCKS = (
    "quick start",
    "implicit shadow",
    "explicit shadow",
    "task model",
    "labels",
    "generate",
    "load a task model",
    "classifier",
    "heads to save",
    "load a classifier",
    "load a projected model",
    "wrap a projected model",
    "configuration",
    "save",
    "load",
    "load in a task model",
    "push",
    "load from the hub",
    "export",
    "trainer",
    "note on generate",
)
"""The page's blocks of Python, in its order."""

MODELS = {
    "Qwen/Qwen3-0.6B": "small",
    "Qwen/Qwen3-8B": "large",
    "shadow-llm/Qwen3-0.6B-H8B": "projected",
    "distilbert-base-uncased": "decoder",  # the page names an encoder, which no version of the package can adapt
}
"""Names of models on the page -> folders in the workspace."""

REPAIRS = {
    "task model": (
        # used, but not imported
        ("from shadow_peft import ", "from shadow_peft import AutoModelForCausalLMWithHiddenProjection, "),
        # the lines around it call them so
        ("model = get_shadow_model(model,", "peft = get_shadow_model(base,"),
    ),
    "trainer": (
        # used, but not imported
        ("from transformers import ", "from transformers import AutoModelForCausalLM, "),
        # to be filled in by the reader
        ("train_dataset=...", "train_dataset=dataset"),
    ),
}
"""Block -> what is replaced in it, and why."""

FILES = {"shadow_config.json", "shadow_adapter.safetensors"}


@dataclass(frozen=True)
class Run:
    """One process.

    Args:
        steps: names of blocks, and lines of our own that stand between them.
        check: asked after the last step, with the variables, what was printed, and the folder for the page's paths.
        folder: where the page's paths lead; runs with the same folder find each other's files.
    """

    steps: tuple[str, ...]
    check: Callable[[dict[str, Any], str, Path], None]
    folder: str


# ------------------------------------------------------------------ checks


def trained_and_counted(v: dict[str, Any], printed: str, folder: Path) -> None:
    """One line of three numbers that are the model's own; all that is trained belongs to the shadow."""
    model = v["model"]
    trained, total = numbers(printed)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith("shadow_") for name in names), names


def projection_is_reused(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The adapter starts with the projection that the shadow carries."""
    trained_and_counted(v, printed, folder)
    ours, given = (v[name].shadow_hidden_projection.weight for name in ("model", "shadow_model"))
    assert bool((ours == given).all())


def logits_are_there(v: dict[str, Any], printed: str, folder: Path) -> None:
    """Three shapes `[1, T, V]`: both logits, then those of the shadow."""
    shape = f"torch.Size([1, {v['inputs']['input_ids'].shape[1]}, {VOCABULARY}])"
    assert printed.splitlines() == [shape] * 3, printed
    assert bool((v["out"].logits == v["out"].shadow_logits).all())


def loss_is_the_sum(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The loss is printed; in eval mode it is base CE + 0.05 * shadow CE of the returned logits."""
    from torch.nn.functional import cross_entropy

    assert printed.splitlines()[-1].startswith("tensor("), printed
    v["out"].loss.backward()
    out = v["model"].eval()(**v["inputs"], labels=v["labels"])
    base, shadow = (cross_entropy(x[0, :-1], v["labels"][0, 1:]) for x in (out.logits, out.shadow_logits))
    assert abs(float(out.loss - base - 0.05 * shadow)) < 1e-5


def text_is_generated(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The prompt and up to 32 tokens behind it."""
    length = v["inputs"]["input_ids"].shape[1]
    assert v["gen_ids"].shape[0] == 1
    assert length < v["gen_ids"].shape[1] <= length + 32
    assert printed.splitlines()[-1].replace(" ", "").startswith("Hello")


def task_model_is_loaded(v: dict[str, Any], printed: str, folder: Path) -> None:
    """Frozen, and computing what was saved, which is not what the base computes."""
    assert not any(p.requires_grad for p in v["model"].parameters())
    logits = v["model"](**v["inputs"]).logits
    assert near(logits, v["saved"](**v["inputs"]).logits)
    assert not near(logits, v["AutoModelForCausalLM"].from_pretrained(v["base"].config.name_or_path)(**v["inputs"]).logits)


def classes_are_there(v: dict[str, Any], printed: str, folder: Path) -> None:
    """Three tensors `[1, 2]`."""
    assert printed.count("tensor([[") == 3, printed
    assert v["out"].logits.shape == v["out"].shadow_logits.shape == (1, 2)


def heads_are_saved(v: dict[str, Any], printed: str, folder: Path) -> None:
    """Both heads are trained by default, and the named ones are in a file of their own."""
    from safetensors.torch import load_file

    heads = ("classifier_head", "shadow_classifier_head")
    assert all(getattr(v["model"], head).weight.requires_grad for head in heads)
    model = v["ShadowForSequenceClassification"](v["get_shadow_model"](fresh_classifier(v), v["shadow_config"]))
    model.save_pretrained(folder / "heads")
    assert set(os.listdir(folder / "heads")) >= FILES | {"shadow_modules.safetensors"}
    assert set(load_file(folder / "heads" / "shadow_modules.safetensors")) == {f"{head}.weight" for head in heads}


def classifier_is_loaded(v: dict[str, Any], printed: str, folder: Path) -> None:
    """Frozen, two classes."""
    assert not any(p.requires_grad for p in v["model"].parameters())
    assert v["model"](input_ids=v["inputs"]["input_ids"]).logits.shape == (1, 2)


def freezes_as_asked(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The backbone trains, its table and the head do not."""
    model = v["shadow_model"]
    assert not any(p.requires_grad for p in model.get_input_embeddings().parameters())
    assert not model.lm_head.weight.requires_grad
    assert model.shadow_hidden_projection.weight.requires_grad
    assert all(p.requires_grad for p in model.shadow_model.layers.parameters())


def projection_is_optimal(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The files of a transformers model, and a projection that no other beats at ||W_large @ P - W_small||."""
    import torch

    assert set(os.listdir(folder / "Qwen3-0.6B-H8B")) >= {"config.json", "model.safetensors"}
    large, small = v["large"].lm_head.weight.detach(), v["small"].lm_head.weight.detach()
    found = v["wrapped"].shadow_hidden_projection.weight.detach()
    best = torch.linalg.lstsq(large, small, driver="gelsd").solution
    assert float((large @ found - small).norm()) <= float((large @ best - small).norm()) + 1e-3


def files_are_written(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The files that the page names, no head among them."""
    written = set(os.listdir(folder / "checkpoint"))
    assert written >= FILES, written
    assert "shadow_modules.safetensors" not in written


def files_of_heads_are_written(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The same with the file of the heads, and nothing of the base among them."""
    from safetensors.torch import load_file

    assert set(os.listdir(folder / "checkpoint")) >= FILES | {"shadow_modules.safetensors"}
    parts = ("shadow_model.", "shadow_hidden_projection.", "shadow_injection_model.", "shadow_update_model.")
    assert all(name.startswith(parts) for name in load_file(folder / "checkpoint" / "shadow_adapter.safetensors"))


def adapter_is_loaded(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The model that was loaded last is trainable, the one before was not; the base is frozen in both."""
    assert any(p.requires_grad for p in v["model"].shadow_model.parameters())
    assert not any(p.requires_grad for p in v["model"].base_model.parameters())
    import torch

    assert v["model"](input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, VOCABULARY)


def task_model_holds_it(v: dict[str, Any], printed: str, folder: Path) -> None:
    """A frozen task model."""
    assert type(v["model"]).__name__ == "ShadowForCausalLM"
    assert not any(p.requires_grad for p in v["model"].parameters())


def hub_has_it(v: dict[str, Any], printed: str, folder: Path) -> None:
    """A private repository with the adapter's files and the message."""
    from huggingface_hub import HfApi

    info = HfApi().model_info("your-org/my-shadow-adapter", token=TOKEN)
    assert info.private
    assert {file.rfilename for file in info.siblings} >= FILES


def hub_gives_it(v: dict[str, Any], printed: str, folder: Path) -> None:
    """A frozen adapter on the base."""
    assert type(v["model"]).__name__ == "ShadowPeftModel"
    assert not any(p.requires_grad for p in v["model"].parameters())


def export_stands_alone(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The exported model computes the shadow's logits."""
    import torch

    ids = torch.tensor([[5, 6, 7]])
    assert near(v["standalone"].eval()(input_ids=ids).logits, v["model"].eval()(input_ids=ids).shadow_logits)


def export_is_projected(v: dict[str, Any], printed: str, folder: Path) -> None:
    """A shadow of another width is exported with its projection and the base's head."""
    export_stands_alone(v, printed, folder)
    for name in ("shadow_only", "standalone"):
        assert type(v[name]).__name__ == "AutoModelForCausalLMWithHiddenProjection"


def trainer_has_trained(v: dict[str, Any], printed: str, folder: Path) -> None:
    """Three epochs of one step each, the adapter moved, and only the adapter was saved."""
    assert v["trainer"].state.global_step == 3
    assert bool((v["peft"].shadow_injection_model.injection_ups != 0).any())
    assert set(os.listdir(folder / "shadow-checkpoint")) >= FILES


def positional_ids_generate(v: dict[str, Any], printed: str, folder: Path) -> None:
    """The ids and up to 64 tokens behind them."""
    length = v["input_ids"].shape[1]
    assert length < v["outputs"].shape[1] <= length + 64


def near(a: Any, b: Any) -> bool:
    """Equal to 1e-5."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-5


def numbers(printed: str) -> tuple[int, int]:
    """The first two numbers of the printed line."""
    trained, total = re.findall(r"[\d,]+", printed)[:2]
    return int(trained.replace(",", "")), int(total.replace(",", ""))


def less_frozen(printed: str, frozen: int) -> tuple[int, int]:
    """The numbers of a printed line of 0.1.1 with what is frozen here."""
    trained, total = numbers(printed)
    return trained - frozen, total


def fresh_classifier(v: dict[str, Any]) -> Any:
    """The page's base once more."""
    return v["AutoModelForSequenceClassification"].from_pretrained(v["base"].config.name_or_path, num_labels=2)


SAVE_EXPLICIT = textwrap.dedent("""
    saved = model.eval()
    saved.set_inference_mode("base_shadow")
    saved.peft_model.shadow_injection_model.injection_ups.data.normal_()
    saved.save_pretrained("/path/to/shadow_checkpoint")
""")
SAVE_CLASSIFIER = textwrap.dedent("""
    base = AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased", num_labels=2)
    peft = get_shadow_model(base, ShadowConfig(num_shadow_layers=1))
    ShadowForSequenceClassification(peft).save_pretrained("/path/to/shadow_checkpoint")
""")
DATASET = 'dataset = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4'

RUNS = {
    "quick start": Run(("quick start",), trained_and_counted, "a"),
    "implicit shadow": Run(("implicit shadow",), trained_and_counted, "a"),
    "explicit shadow": Run(("explicit shadow",), projection_is_reused, "a"),
    "task model": Run(("task model",), logits_are_there, "a"),
    "labels": Run(("task model", "labels"), loss_is_the_sum, "a"),
    "generate": Run(("task model", "labels", "generate"), text_is_generated, "a"),
    "load a task model": Run(("task model", SAVE_EXPLICIT, "load a task model"), task_model_is_loaded, "explicit"),
    "classifier": Run(("classifier",), classes_are_there, "a"),
    "heads to save": Run(("classifier", "heads to save"), heads_are_saved, "a"),
    "load a classifier": Run(("classifier", SAVE_CLASSIFIER, "load a classifier"), classifier_is_loaded, "decoder"),
    "load a projected model": Run(("load a projected model",), freezes_as_asked, "a"),
    "wrap a projected model": Run(("wrap a projected model",), projection_is_optimal, "a"),
    "save": Run(("quick start", "save"), files_are_written, "implicit"),
    "save with heads": Run(("classifier", "save"), files_of_heads_are_written, "classifier"),
    "load": Run(("load",), adapter_is_loaded, "implicit"),
    "load in a task model": Run(("load", "load in a task model"), task_model_holds_it, "implicit"),
    "push": Run(("quick start", "push"), hub_has_it, "a"),
    "load from the hub": Run(("load from the hub",), hub_gives_it, "a"),
    "export": Run(("load", "load in a task model", "export"), export_stands_alone, "implicit"),
    "export of another width": Run(("task model", "export"), export_is_projected, "explicit"),
    "trainer": Run((DATASET, "trainer"), trainer_has_trained, "a"),
    "note on generate": Run(
        ("task model", 'input_ids = inputs["input_ids"]', "note on generate"), positional_ids_generate, "a"
    ),
}
"""What is run, in this order: some find what an earlier one has saved."""

COUNTED = {"quick start": 4 * 1024 * 10, "implicit shadow": 4 * 1024 * 8, "explicit shadow": 4 * 4096 * 8}
"""Runs whose printed line is compared with that of 0.1.1 -> parameters that count as trained there and are frozen here: the
update behind the last layer, 4 d k of them, whose state nobody reads."""


# ------------------------------------------------------------------ one run


def python_blocks(readme: str) -> dict[str, str]:
    """Name -> code; blocks inside lists are indented."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```", readme, re.DOTALL | re.MULTILINE)
    return dict(zip(BLOCKS, (textwrap.dedent(code) for _, code in found), strict=True))


def code_of(step: str, blocks: dict[str, str], workspace: Path, folder: Path) -> str:
    """A block as it is run, or a line of our own, with the names of models and the paths replaced."""
    code = blocks.get(step, step)
    for old, new in REPAIRS.get(step, ()):
        if old not in code:
            raise ValueError(f"Block {step!r} has no {old!r} to repair.")
        code = code.replace(old, new)
    for name, local in MODELS.items():
        code = code.replace(f'"{name}"', repr(str(workspace / local)))
    return code.replace('"/path/to/', f'"{folder}/')


def run_here(name: str, readme: Path, workspace: Path) -> str:
    """Run and check one entry of `RUNS`; what it printed."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = RUNS[name]
    folder = workspace / run.folder
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    blocks = python_blocks(readme.read_text(encoding="utf-8"))
    variables: dict[str, Any] = {"__name__": "__main__"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for step in run.steps:
            exec(compile(code_of(step, blocks, workspace, folder), f"<{step}>", "exec"), variables)
    run.check(variables, output.getvalue(), folder)
    return output.getvalue()


def make_models(workspace: Path) -> None:
    """Random models in place of the page's: two Qwen3 as wide as the real ones, one projected to the other, a small one."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from torch import nn
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    from shadow_peft import AutoModelForCausalLMWithHiddenProjection

    torch.manual_seed(0)
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, **ids}
    small = Qwen3ForCausalLM(Qwen3Config(hidden_size=1024, num_hidden_layers=3, tie_word_embeddings=True, **sizes))
    large = Qwen3ForCausalLM(Qwen3Config(hidden_size=4096, num_hidden_layers=4, tie_word_embeddings=False, **sizes))
    projected = AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small, shadow_hidden_projection=nn.Linear(1024, 4096, bias=False), lm_head=large.lm_head
    )
    decoder = Qwen3ForCausalLM(Qwen3Config(hidden_size=32, num_hidden_layers=3, tie_word_embeddings=True, **sizes))
    names = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127))]
    characters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    for local, model in {"small": small, "large": large, "projected": projected, "decoder": decoder}.items():
        model.save_pretrained(workspace / local)
        tokenizer.save_pretrained(workspace / local)


# ------------------------------------------------------------------ all runs


def in_a_process(python: str, environment: dict[str, str], *arguments: str) -> dict[str, str]:
    """What a run printed, or its error."""
    command = [python, str(Path(__file__).resolve()), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip(" ^~")]
        return {"error": " -> ".join(lines[-2:])}
    return {"printed": json.loads(run.stdout.strip().rpartition("\n")[2])}


def without_our_path(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which another interpreter finds its own packages."""
    return {name: value for name, value in environment.items() if name != "PYTHONPATH"}


def as_announced(readme: str, printed: str) -> bool:
    """Whether the line of trainable parameters has the words of the page's comment, and numbers where that has numbers."""
    comment = re.search(r"^# (.*\|\|.*)$", readme, re.MULTILINE)
    assert comment is not None
    words = [re.escape(word) for word in re.split(r"~[\d.]+[A-Z%]?", comment[1])]
    pattern = r"[\d.,]+%?".join(re.sub(r"(\\ )+", r"\\s+", word) for word in words)
    return re.fullmatch(pattern, printed.strip()) is not None


def documented_defaults(block: str) -> dict[str, Any]:
    """Name -> default of the configuration reference, which is no Python but annotated arguments."""
    found = re.findall(r"^    (\w+): [^=#]+ = ([^,#]+),$", block, re.MULTILINE)
    return {name: json.loads("null" if value == "None" else value) for name, value in found}


def differing_defaults(block: str) -> list[str]:
    """Fields of the configuration reference that this library has not, or with another default."""
    from shadow_peft import ShadowConfig

    here = ShadowConfig().to_dict()
    return [name for name, value in documented_defaults(block).items() if name not in here or here[name] != value]


def run_all(readme: Path, peer: str | None = None) -> bool:
    """Run everything and print a line each; whether all of it works."""
    from tests.hub.fake import FakeHub, running

    text = readme.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary, running(FakeHub()) as hub:
        folder = Path(temporary)
        make_models(folder)
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "cache"), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        errors: dict[str, str] = {}
        for name in RUNS:
            result = in_a_process(sys.executable, environment, "run", name, str(readme), str(folder))
            if "error" in result:
                errors[name] = result["error"]
            elif name in COUNTED and not as_announced(text, result["printed"]):
                errors[name] = f"prints {result['printed'].strip()!r}"
            elif name in COUNTED and peer is not None:
                there = in_a_process(peer, without_our_path(environment), "run", name, str(readme), str(folder))
                if "error" in there or less_frozen(there["printed"], COUNTED[name]) != numbers(result["printed"]):
                    errors[name] = f"prints {result['printed'].strip()!r}, {VERSION} {next(iter(there.values())).strip()!r}"
            print(f"  {name:<26} {errors.get(name, 'ok')}", flush=True)
    different = differing_defaults(python_blocks(text)["configuration"])
    if different:
        errors["configuration"] = f"other defaults: {', '.join(different)}"
    print(f"  {'configuration':<26} {errors.get('configuration', 'ok')}")
    count = len(RUNS) + 1
    print(f"package page of {VERSION}: {count - len(errors)} of {count} runs do what it says")
    return not errors


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["run"]:
        name, readme, workspace = sys.argv[2:]
        print(json.dumps(run_here(name, Path(readme), Path(workspace))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with shadow-peft 0.1.1")
    options = parser.parse_args()
    from tests.compat.sdists import unpack_sdist

    with tempfile.TemporaryDirectory() as folder:
        readme = unpack_sdist(VERSION, Path(folder)) / "README.md"
        return 0 if run_all(readme, options.peer) else 1


if __name__ == "__main__":
    sys.exit(main())
