"""Pretrains the embedded shadow of ``shadow-peft demo``: thin layers cut from the embedded base, trained on its text.

The shadow is cut as ``ShadowConfig`` says, exported to a stock Llama and trained as any small language model is, but for
its embedding table, which stays the base's. The committed shadow was made by

    OMP_NUM_THREADS=1 python scripts/pretrain_demo_shadow.py --compile

and its loss curve lies beside it. ``--resume`` goes on after an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pretrain_demo_base import Text, gather
from pretraining import ROOT, Schedule, pretrain
from transformers import HfArgumentParser, set_seed

from shadow_peft import ShadowConfig, get_shadow_model
from shadow_peft.demo.embedded import load_base, load_tokenizer

CUT = ShadowConfig(
    num_shadow_layers=4, shadow_init="base", shadow_init_layers="even",
    shadow_intermediate_size=80, shadow_num_attention_heads=2, shadow_num_key_value_heads=1,
)  # fmt: skip


@dataclass
class Recipe(Schedule):
    """How the shadow is trained; the defaults made the committed one."""

    output: Path = field(default=ROOT / "src/shadow_peft/demo/shadow", metadata={"help": "Folder of the finished shadow."})
    work: Path = field(default=Path("/tmp/demo-shadow"), metadata={"help": "Folder of the training checkpoints."})
    steps: int = field(default=6000, metadata={"help": "Optimizer steps that the learning rate is planned for."})
    stop_at: int = field(default=6000, metadata={"help": "Step after which training ends."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate (AdamW)."})


def main() -> None:
    """Cut, text, training, finished shadow."""
    recipe, text = HfArgumentParser((Recipe, Text)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    set_seed(recipe.seed)
    shadow = get_shadow_model(load_base(), CUT).export_shadow().float()
    shadow.get_input_embeddings().requires_grad_(False)  # the head is tied to it
    pretrain(shadow, load_tokenizer(), gather(text, recipe.seed), recipe)


if __name__ == "__main__":
    main()
