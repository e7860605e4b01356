"""Attach a fresh shadow to a base and print what would be trained.

python examples/attach.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32").eval()
inputs = AutoTokenizer.from_pretrained(BASE_PATH)("Open the door.", return_tensors="pt")
with torch.no_grad():
    before = base(**inputs).logits

config = ShadowConfig(num_shadow_layers=1, injection_hidden_size=16, gate_hidden_size=10, alpha=0.1, dropout=0.2)
model = get_shadow_model(base, config)
model.print_trainable_parameters()

with torch.no_grad():
    after = model(**inputs).logits
assert torch.allclose(before, after, atol=1e-5), "a fresh shadow changes nothing"
print("a fresh shadow leaves the logits as they were")
