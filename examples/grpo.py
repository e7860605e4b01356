"""Learn from rewards with TRL's GRPOTrainer: the adapted base generates, and its shadow is distilled from it.

python examples/grpo.py
"""

import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other
from shadow_peft.training import ShadowGRPOTrainer


def digits(completions: list[str], **kwargs: object) -> list[float]:
    """The share of digits in a completion."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


data = Dataset.from_list([{"prompt": f"{a} + {b} = "} for a in range(8) for b in range(8)])
base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig()), shadow_loss_weight=0.5)

with tempfile.TemporaryDirectory() as directory:
    args = GRPOConfig(
        directory, max_steps=6, learning_rate=1e-2, beta=0.01, num_generations=4, max_completion_length=8, logging_steps=3,
        report_to="none", bf16=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    trainer = ShadowGRPOTrainer(model, digits, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()

for row in trainer.state.log_history:
    if "base_loss" in row:
        print("step", row["step"], "reward", row["reward"], "divergence of the shadow", row["shadow_loss"])
