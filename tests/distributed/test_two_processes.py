"""`accelerate launch` with the shipped configurations, two processes over gloo: what one process computes, they compute.

Each configuration is launched once and trains several times in that launch: a run, its second half resumed from the
checkpoint in the middle and, sharded, a run with trained heads. All are compared with the same runs of one process at the
same global batch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shadow_peft.cli import main
from shadow_peft.demo.robot_commands import commands
from tests.cli.conftest import tiny_tokenizer, write_lines
from tests.tiny_models import llama

ROOT = Path(__file__).parents[2]
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPShadowForCausalLM"}
RUNS = {"ddp": ["whole"], "fsdp2": ["whole", "heads"]}
STEPS = 4
OPTIONS = [
    *(
        "--max_steps",
        str(STEPS),
        "--save_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--logging_steps",
        "1",
    ),
    *("--learning_rate", "0.01", "--lr_scheduler_type", "constant", "--dropout", "0", "--shadow_loss_weight", "0.5"),
    *("--gradient_accumulation_steps", "2", "--bf16", "False", "--use_cpu", "--disable_tqdm", "True"),
]
HEADS = ["--modules_to_save", "lm_head", "shadow_lm_head"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bases, tied and untied, and data."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, tied in (("tied", True), ("untied", False)):
        llama(vocab_size=300, eos_token_id=1, bos_token_id=None, tie_word_embeddings=tied).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_lines(folder / "train.jsonl", [c.row() for c in commands("train", 48)])
    write_lines(folder / "eval.jsonl", [c.row() for c in commands("dev", 8)])
    return folder


def arguments(places: Path, output: Path, base: str, processes: int, *more: str) -> list[str]:
    """A run whose optimiser step sees eight examples, however many processes share them."""
    data = ["--data", str(places / "train.jsonl"), "--eval_data", str(places / "eval.jsonl")]
    batch = ["--per_device_train_batch_size", str(4 // processes)]
    return ["--model", str(places / base), *data, "--output", str(output), *batch, *OPTIONS, *more]


@pytest.fixture(scope="module")
def alone(places: Path) -> Path:
    """The runs of one process."""
    assert main(["train", *arguments(places, places / "alone" / "whole", "tied", 1)]) == 0
    assert main(["train", *arguments(places, places / "alone" / "heads", "untied", 1, *HEADS)]) == 0
    return places / "alone"


@pytest.fixture(scope="module", params=WRAPPED)
def together(request: pytest.FixtureRequest, places: Path) -> Path:
    """The same runs of two processes, and the first one resumed from its middle."""
    folder = places / request.param
    middle = folder / "whole" / f"checkpoint-{STEPS // 2}"
    runs = [
        arguments(places, folder / "whole", "tied", 2),
        arguments(places, folder / "resumed", "tied", 2, "--resume_from_checkpoint", str(middle)),
    ]
    if "heads" in RUNS[request.param]:
        runs.append(arguments(places, folder / "heads", "untied", 2, *HEADS))
    launch(request.param, runs)
    return folder


def launch(configuration: str, runs: list[list[str]]) -> None:
    command = [
        *(f"{sysconfig.get_path('scripts')}/accelerate", "launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "recipes" / "accelerate" / f"{configuration}.yaml")),
        *(str(ROOT / "tests" / "distributed" / "worker.py"), json.dumps(runs)),
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]


def losses(run: Path, name: str) -> list[float]:
    state: dict[str, Any] = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    return [row[name] for row in state["log_history"] if name in row]


def noted(run: Path, process: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"facts-{process}.json").read_text(encoding="utf-8"))
    return found


def test_losses_are_those_of_one_process(alone: Path, together: Path) -> None:
    for run in RUNS[together.name]:
        for name, count in (("loss", STEPS), ("eval_loss", 3), ("grad_norm", STEPS)):
            expected, measured = losses(alone / run, name), losses(together / run, name)
            assert len(expected) == count
            assert measured == pytest.approx(expected, rel=2e-6), (run, name)
        first, *_, last = losses(together / run, "loss")
        assert abs(first - last) > 0.05  # something was learned


def test_adapter_is_saved_as_one_process_saves_it(alone: Path, together: Path) -> None:
    for run in RUNS[together.name]:
        for file in ("shadow_adapter_readout", "shadow_modules")[: 1 + (run == "heads")]:
            expected, saved = (load_file(folder / run / f"{file}.safetensors") for folder in (alone, together))
            assert saved.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(saved[name], tensor, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        names = {path.name for path in (together / run).iterdir()}
        assert {"README.md", "losses.png", "tokenizer.json", "trainer_state.json"} <= names
        assert "| processes | 2 |" in (together / run / "README.md").read_text(encoding="utf-8")


def test_saved_adapter_reloads_to_what_was_trained(together: Path) -> None:
    assert all(noted(together / run, 0)["reloads_equal"] for run in ("resumed", *RUNS[together.name]))


def test_resumed_run_goes_on_as_the_whole_one_did(together: Path) -> None:
    assert losses(together / "resumed", "loss") == losses(together / "whole", "loss")
    one, other = (load_file(together / run / "shadow_adapter_readout.safetensors") for run in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_is_worked_around_and_the_base_is_sharded(together: Path) -> None:
    for process in (0, 1):
        found = noted(together / "whole", process)
        assert found["wrapped"] == WRAPPED[together.name]
        share = found["base_here"] / found["base_whole"]
        if together.name == "ddp":
            assert found["unused_parameters"] is False
            assert share == 1
        else:
            assert share == pytest.approx(0.5, abs=0.01)


def test_checkpoint_of_two_processes_goes_on_alone(
    together: Path, places: Path, tmp_path: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DDP's checkpoints are those of one process; FSDP's are its own, and transformers says so."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(together / "whole" / "checkpoint-2", checkpoint)
    run = arguments(places, tmp_path / "out", "tied", 1, "--resume_from_checkpoint", str(checkpoint))
    if together.name == "fsdp2":
        assert main(["train", *run]) == 1
        assert "only supported when using PyTorch FSDP" in capsys.readouterr().err
        return
    assert main(["train", *run]) == 0
    assert losses(tmp_path / "out", "loss") == pytest.approx(losses(alone / "whole", "loss"), rel=2e-6)
