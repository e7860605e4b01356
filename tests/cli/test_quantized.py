"""The command line on a quantized base: trained, resumed, exported, and used as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from shadow_peft import ShadowForCausalLM, ShadowForSequenceClassification
from shadow_peft.base.quantization import quantization_method
from shadow_peft.cli import classify, loading, main
from shadow_peft.cli.options import QuantizationOptions
from tests.cli.test_eval import tasks  # noqa: F401 - a fixture
from tests.quantized_bases import need, save_base

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes has warnings of its own

QUIET = ["--disable_tqdm", "True", "--use_cpu", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
FLAGS = {
    4: ["--load_in_4bit", "--use_bnb_nested_quant"],
    8: ["--load_in_8bit"],
}
CONFIGS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True},
}


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    """A base with the tokenizer of `model_folder`, wide enough to be quantized."""
    folder = save_base(tmp_path / "base")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", FLAGS)
def test_train_resume_export_and_generate(
    bits: int, base: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(f"bitsandbytes {bits}")
    out, whole = tmp_path / "out", tmp_path / "whole"
    train = ["train", "--model", str(base), "--data", str(data_file), *FLAGS[bits], *QUIET]
    train += ["--lr_scheduler_type", "constant", "--eval_fraction", "0.25", "--eval_strategy", "steps", "--eval_steps", "1"]
    train += ["--save_steps", "1"]
    assert main([*train, "--output", str(whole), "--max_steps", "2"]) == 0
    assert main([*train, "--output", str(out), "--max_steps", "1"]) == 0
    resumed = ["--max_steps", "2", "--resume_from_checkpoint", "last", "--export"]
    assert main([*train, "--output", str(out), *resumed]) == 0
    weights = [load_file(folder / "shadow_adapter_readout.safetensors") for folder in (whole, out)]
    assert {value.dtype for value in weights[0].values()} == {torch.float32}
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name

    card = (out / "README.md").read_text(encoding="utf-8")
    assert f'shadow-peft generate --adapter out {" ".join(FLAGS[bits])} "Hello"\n' in card
    assert f"| base | `{base.name}`, `{' '.join(FLAGS[bits])}` |" in card
    assert f'"{base.name}", quantization_config=BitsAndBytesConfig(load_in_{bits}bit=True' in card
    said = capsys.readouterr().out
    assert f"shadow-peft generate --adapter {out} {' '.join(FLAGS[bits])} " in " ".join(said.split())
    capsys.readouterr()
    assert main(["generate", "say", "--adapter", str(out), *FLAGS[bits], "--max_new_tokens", "6"]) == 0
    said = capsys.readouterr().out

    tokenizer, config = AutoTokenizer.from_pretrained(base), BitsAndBytesConfig(**CONFIGS[bits])
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=config).eval()
    model, ids = ShadowForCausalLM.from_pretrained(loaded, out), tokenizer("say", return_tensors="pt")["input_ids"]
    added = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert said == tokenizer.decode(added, skip_special_tokens=True) + "\n"
    exported = AutoModelForCausalLM.from_pretrained(out / "shadow")
    assert all(p.is_floating_point() for p in exported.parameters())


def test_lora_on_a_quantized_base_computes_in_the_dtype_of_its_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA folder has no config.json to read a dtype from."""
    need("bitsandbytes 4")
    from bitsandbytes.nn import Linear4bit

    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    whole.save_pretrained(base)
    lora = str(tmp_path / "lora")
    get_peft_model(whole, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(lora)
    AutoTokenizer.from_pretrained(base).save_pretrained(lora)
    loaded = loading.load_base(lora, QuantizationOptions(load_in_4bit=True), dtype="auto")
    assert {m.compute_dtype for m in loaded.modules() if isinstance(m, Linear4bit)} == {torch.bfloat16}
    assert main(["generate", "say", "--model", lora, "--load_in_4bit", "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_eval_scores_the_quantized_base(base: Path, tasks: Path, tmp_path: Path) -> None:  # noqa: F811
    need("bitsandbytes 4")
    scores = []
    for flags in (FLAGS[4], []):
        output = tmp_path / f"scores{len(flags)}.json"
        places = ["--model", str(base), "--include_path", str(tasks), "--tasks", "colours", "--device", "cpu", *flags]
        assert main(["eval", *places, "--output", str(output), "--log_samples"]) == 0
        samples = json.loads(output.read_text(encoding="utf-8"))["modes"]["bare"]["samples"]["colours"]
        scores.append([float(answer[0]) for sample in samples for answer in sample["filtered_resps"]])
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--load_in_4bit", "--load_in_8bit"], "at the same time"),
        (["--use_bnb_nested_quant"], "--use_bnb_nested_quant says how 4 bit weights are stored; add --load_in_4bit"),
        (["--load_in_8bit", "--bnb_4bit_quant_type", "fp4"], "--bnb_4bit_quant_type says how 4 bit weights are stored"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", "none", "--data", "none", "--output", str(tmp_path / "out"), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    said = said.replace("at the same time", "exclude each other")
    assert main(["generate", "say", "--model", "none", *options]) == 1
    assert said in capsys.readouterr().err


def test_fsdp_and_8_bits_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("bitsandbytes 8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "--model", "m", "--data", "d", "--output", str(tmp_path / "out"), "--load_in_8bit"]) == 1
    assert "FSDP cannot shard 8 bit weights of bitsandbytes" in capsys.readouterr().err


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert main(["generate", "say", "--model", "none", "--load_in_8bit"]) == 1
    assert "--load_in_8bit needs bitsandbytes: pip install 'shadow-peft[quantized]'" in capsys.readouterr().err


def test_help_does_not_speak_of_lora_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "Works only with LoRA" not in " ".join(capsys.readouterr().out.split())


def test_a_classifier_answers_on_the_base_that_it_was_trained_on(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("bitsandbytes 4")
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"say {i}", "label": "ab"[i % 2]} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out, options = tmp_path / "out", ["--task", "classification", "--max_steps", "2", *QUIET, *FLAGS[4]]
    assert main(["train", "--model", str(base), "--data", str(data), "--output", str(out), *options]) == 0
    flags = " ".join(FLAGS[4])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f'shadow-peft classify --adapter {out.name} {flags} "Hello"' in card
    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True" in card
    assert f"shadow-peft classify --adapter {out} {flags} " in " ".join(capsys.readouterr().out.split())
    methods: list[str | None] = []

    def answered(model: ShadowForSequenceClassification, *_: object) -> tuple[str, float]:
        methods.append(quantization_method(model.peft_model.base_model))
        return "a", 1.0

    monkeypatch.setattr(classify, "classified", answered)
    for more in (FLAGS[4], [*FLAGS[4], "--model", str(base)], []):
        assert main(["classify", "--adapter", str(out), "say 1", *more]) == 0
    assert methods == ["bitsandbytes", "bitsandbytes", None]
