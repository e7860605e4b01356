"""Learn preferences with TRL's DPOTrainer; the reference is the bare base, without a second copy.

python examples/dpo.py
"""

import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other
from shadow_peft.training import ShadowDPOTrainer

sums = [(a, b) for a in range(8) for b in range(4)]
data = Dataset.from_list(
    [{"prompt": f"{a} + {b} = ", "chosen": f"{a + b}", "rejected": f"{a + b + 1}, I think"} for a, b in sums]
)
base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig()), shadow_loss_weight=0.5)

with tempfile.TemporaryDirectory() as directory:
    args = DPOConfig(directory, max_steps=10, learning_rate=1e-2, logging_steps=5, report_to="none", bf16=False)
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    trainer = ShadowDPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()

losses = [row for row in trainer.state.log_history if "base_loss" in row]
for row in losses:
    print("step", row["step"], "DPO", row["base_loss"], "shadow", row["shadow_loss"], "margin", row["rewards/margins"])
assert losses[-1]["rewards/margins"] > 0
