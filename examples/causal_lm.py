"""Train a causal language model and its shadow by hand.

python examples/causal_lm.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig()), shadow_loss_weight=0.05)

texts = ["open the door = {action: open}", "close the left window = {action: close}"]
batch = tokenizer(texts, padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)  # nothing is learned from the padding
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

model.train()
losses = []
for step in range(10):
    outputs = model(**batch, labels=labels)  # no logits, unless asked for
    outputs.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(outputs.loss.item())
    print(f"step {step}: loss {losses[-1]:.3f}")

outputs = model.eval()(**batch)
print("logits of the adapted base", tuple(outputs.logits.shape), "and of the shadow", tuple(outputs.shadow_logits.shape))
assert losses[-1] < losses[0]
