"""One of the processes that `accelerate launch` starts: runs `shadow-peft train` some times and notes what it holds.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml tests/distributed/worker.py '[["--model", ...], ...]'

accelerate offers FSDP beside accelerators alone and would fall back to DDP on a CPU, where torch's FSDP2 itself runs well
over gloo. So the worker tells it that its processes are those of an accelerator; all else is as the shipped configuration
says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from shadow_peft import ShadowForCausalLM
from shadow_peft.cli import main
from shadow_peft.cli import train as verb

_started = PartialState.__init__


def start_as_accelerator(self: PartialState, *args: Any, **kwargs: Any) -> None:
    _started(self, *args, **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def reloads_equal(trainer: Any, output: Path) -> bool:
    """Whether the saved adapter on a fresh base has every parameter that was trained, bit for bit."""
    gathered = trainer.accelerator.get_state_dict(trainer.model)  # every process takes part
    if not trainer.is_world_process_zero():
        return True
    base = AutoModelForCausalLM.from_pretrained(trainer.facts.base, dtype=torch.float32)
    loaded = ShadowForCausalLM.from_pretrained(base, output)
    state = {**dict(loaded.named_parameters()), **loaded.state_dict()}  # names of parameters, where sharded, and of the file
    return bool(gathered) and all(torch.equal(state[name], tensor) for name, tensor in gathered.items())


def facts(trainer: Any, output: Path) -> dict[str, Any]:
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the outermost parameters whole
    base = list(trainer.model.peft_model.base_model.parameters())
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "unused_parameters": getattr(trainer.model_wrapped, "find_unused_parameters", None),
        "base_here": sum(local(p).numel() for p in base),
        "base_whole": sum(p.numel() for p in base),
        "reloads_equal": reloads_equal(trainer, output),
    }


def save_and_note(trainer: Any, tokenizer: Any, output: Path, export: bool) -> None:
    saved(trainer, tokenizer, output, export)
    trainer.accelerator.wait_for_everyone()
    noted = facts(trainer, output)
    (output / f"facts-{trainer.accelerator.process_index}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState.__init__ = start_as_accelerator
    saved, verb.save = verb.save, save_and_note
    for arguments in json.loads(sys.argv[1]):
        if main(["train", *arguments]) != 0:
            sys.exit(1)
    torch.distributed.destroy_process_group()
