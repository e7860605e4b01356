"""Classify sequences; padding may be on either side.

python examples/sequence_classification.py
"""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForSequenceClassification, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForSequenceClassification.from_pretrained(BASE_PATH, num_labels=3, dtype="float32")  # the head is new
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = ShadowForSequenceClassification(get_shadow_model(base, ShadowConfig()))
model.print_trainable_parameters()  # both classification heads are trained and saved with the adapter

texts, labels = ["Open the door.", "What is the time in the kitchen now?"], torch.tensor([0, 2])
batch = tokenizer(texts, padding=True, return_tensors="pt")
outputs = model(**batch, labels=labels)
outputs.loss.backward()
print(f"loss {outputs.loss.item():.3f}, logits {tuple(outputs.logits.shape)}")

model.eval()
with torch.no_grad():
    left = model(**batch).logits
    tokenizer.padding_side = "right"
    right = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
assert torch.allclose(left, right, atol=1e-4), "the side of the padding does not matter"
