"""A quantized base in two processes: the losses and the adapter of one process; FSDP2 shards its 4 bit weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shadow_peft.cli import main
from shadow_peft.demo.robot_commands import commands
from tests.cli.conftest import tiny_tokenizer, write_lines
from tests.distributed.test_two_processes import launch, losses, noted
from tests.quantized_bases import need, save_base

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes has warnings of its own

OPTIONS = [
    *(
        "--max_steps",
        "3",
        "--logging_steps",
        "1",
        "--learning_rate",
        "0.1",
        "--optim",
        "sgd",
        "--lr_scheduler_type",
        "constant",
    ),
    *("--dropout", "0", "--bf16", "False", "--use_cpu", "--disable_tqdm", "True"),
]


@pytest.mark.parametrize(
    ("configuration", "bits"), [("ddp", 4), ("ddp", 8), ("fsdp2", 4)], ids=["ddp, 4", "ddp, 8", "fsdp2, 4"]
)
def test_two_processes_train_as_one(configuration: str, bits: int, tmp_path: Path) -> None:
    need(f"bitsandbytes {bits}")
    base = save_base(tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    write_lines(tmp_path / "train.jsonl", [c.row() for c in commands("train", 24)])

    def arguments(run: str, batch: int) -> list[str]:
        places = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / run)]
        return [*places, f"--load_in_{bits}bit", "--per_device_train_batch_size", str(batch), *OPTIONS]

    assert main(["train", *arguments("alone", 4)]) == 0
    launch(configuration, [arguments("together", 2)])
    assert losses(tmp_path / "together", "loss") == pytest.approx(losses(tmp_path / "alone", "loss"), rel=1e-5)
    weights = [load_file(tmp_path / run / "shadow_adapter_readout.safetensors") for run in ("alone", "together")]
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, rtol=1e-3, atol=1e-4), name
    facts = noted(tmp_path / "together", 0)
    assert facts["reloads_equal"]
    assert (facts["base_here"] < facts["base_whole"]) == (configuration == "fsdp2")
