"""Fine-tune with TRL's SFTTrainer: completions only, packed, with a learning rate of the backbone's own.

python examples/sft.py
"""

import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other
from shadow_peft.training import ShadowSFTTrainer

data = Dataset.from_list([{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(8) for b in range(8)])
base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig()), shadow_loss_weight=0.5)

with tempfile.TemporaryDirectory() as directory:
    args = SFTConfig(
        directory, max_steps=30, learning_rate=3e-3, packing=True, max_length=64, logging_steps=10,
        report_to="none", bf16=False,
    )  # fmt: skip
    trainer = ShadowSFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(BASE_PATH),
        shadow_learning_rate_scale=0.5,  # for a pretrained backbone try 1 and 0.3
    )
    trainer.train()

losses = [row for row in trainer.state.log_history if "base_loss" in row]
for row in losses:
    print("step", row["step"], "loss of the adapted base", row["base_loss"], "and of the shadow", row["shadow_loss"])
assert losses[-1]["shadow_loss"] < losses[0]["shadow_loss"]
