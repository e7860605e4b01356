"""A pretraining that is killed and resumed ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shadow_peft.cli import main
from tests.tiny_models import llama

ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
STAGES = {
    "next token": [],
    "distillation": ["--distillation_weight", "1", "--next_token_weight", "0", "--top_k", "8"],
    "cached": ["--distillation_weight", "1", "--teacher_cache", "teacher", "--gradient_accumulation_steps", "2"],
    "narrow": ["--shadow_hidden_size", "16", "--shadow_init_layers", "1,3"],
    "small": ["--small", "small"],
    "aligned": ["--small", "small", "--align"],
}
KILLED = """
import os, signal, sys
from shadow_peft.cli import main
from shadow_peft.pretraining.trainer import PretrainingTrainer
step = PretrainingTrainer.training_step
def until(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
PretrainingTrainer.training_step = until
main(sys.argv[1:])
"""


def arguments(model: Path, corpus: Path, output: Path) -> list[str]:
    steps = ["--max_steps", "8", "--save_steps", "2", "--eval_steps", "4", "--logging_steps", "2", "--warmup_steps", "2"]
    sizes = ["--context", "16", "--per_device_train_batch_size", "3", "--held_out", "4"]
    return [
        *("pretrain", "--model", str(model), "--data", str(corpus), "--output", str(output)),
        *steps,
        *sizes,
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_uninterrupted(
    stage: str, model_folder: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llama(5, vocab_size=300, **SMALL).save_pretrained("small")
    whole, parts = (
        [*arguments(model_folder, corpus_folder, tmp_path / name), *STAGES[stage]] for name in ("whole", "parts")
    )
    assert main(whole) == 0
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    killed = subprocess.run([sys.executable, "-c", KILLED, *parts], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    (tmp_path / "parts" / "checkpoint-4" / "trainer_state.json").unlink()  # it was killed while that one was written
    assert main([*parts, "--resume"]) == 0
    expected, found = (load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "parts"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    first, last = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_run_from_before_an_option_existed_goes_on(
    model_folder: Path, corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = arguments(model_folder, corpus_folder, tmp_path / "out")
    assert main(parts) == 0
    stored = tmp_path / "out" / "pretraining_options.json"
    options = json.loads(stored.read_text())
    del options["top_k"]
    stored.write_text(json.dumps(options))
    assert main([*parts, "--resume", "--top_k", "8"]) == 1
    assert "holds a run with another --top_k" in capsys.readouterr().err
    assert main([*parts, "--resume"]) == 0


def test_the_seconds_of_all_processes_are_counted(model_folder: Path, corpus_folder: Path, tmp_path: Path) -> None:
    parts = arguments(model_folder, corpus_folder, tmp_path / "out")
    assert main(parts) == 0
    state_file = tmp_path / "out" / "checkpoint-6" / "trainer_state.json"
    for name in ("checkpoint-8", "model.safetensors", "pretraining.json"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = json.loads(state_file.read_text())
    assert all(row["seconds"] > 0 for row in state["log_history"][1:])
    state["log_history"][-1]["seconds"] = 5000.0
    state_file.write_text(json.dumps(state))
    assert main([*parts, "--resume"]) == 0
    seconds = json.loads((tmp_path / "out" / "pretraining.json").read_text())["facts"]["seconds"]
    assert 5000 <= seconds < 5600
