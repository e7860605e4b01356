"""Train with `transformers.Trainer`: default arguments, checkpoints, resuming from one, and the gradient monitor.

python examples/trainer.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other
from shadow_peft.training import GradientMonitor

rows = AutoTokenizer.from_pretrained(BASE_PATH)(["open the door = {action: open}"] * 16)["input_ids"]
data = [{"input_ids": row, "labels": row} for row in rows]

with tempfile.TemporaryDirectory() as directory:

    def trainer(max_steps: int) -> Trainer:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
        model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig()))
        args = TrainingArguments(directory, max_steps=max_steps, save_steps=4, learning_rate=1e-2, report_to="none")
        return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[GradientMonitor()])

    first = trainer(max_steps=4)
    first.train()
    print("after 4 steps:", first.evaluate()["eval_loss"])

    resumed = trainer(max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    print("after 8 steps:", resumed.evaluate()["eval_loss"])
