"""Train a reward model with TRL's RewardTrainer: the adapted base and the detached shadow both score texts.

python examples/reward.py
"""

import tempfile

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from shadow_peft import ShadowConfig, ShadowForSequenceClassification, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other
from shadow_peft.training import ShadowRewardTrainer

sums = [(a, b) for a in range(8) for b in range(4)]
data = Dataset.from_list([{"chosen": f"{a} + {b} = {a + b}", "rejected": f"{a} + {b} = no idea"} for a, b in sums])
base = AutoModelForSequenceClassification.from_pretrained(BASE_PATH, num_labels=1, dtype="float32")  # the head is new
model = ShadowForSequenceClassification(get_shadow_model(base, ShadowConfig()), shadow_loss_weight=0.5)

with tempfile.TemporaryDirectory() as directory:
    args = RewardConfig(directory, max_steps=10, learning_rate=1e-2, logging_steps=5, report_to="none", bf16=False)
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    trainer = ShadowRewardTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()

for row in trainer.state.log_history:
    if "base_loss" in row:
        print("step", row["step"], "base", row["base_loss"], "shadow", row["shadow_loss"], "accuracy", row["accuracy"])
