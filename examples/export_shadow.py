"""Export the shadow as a model of its own, and load it without its base and without this library's classes.

python examples/export_shadow.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(num_shadow_layers=2))).eval()

with tempfile.TemporaryDirectory() as directory:
    model.export_shadow().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    small = AutoModelForCausalLM.from_pretrained(directory)
assert type(small) is type(base), "a shadow as wide as its base is a stock model of the base's architecture"

inputs = tokenizer("Open the door.", return_tensors="pt")
with torch.no_grad():
    assert torch.allclose(small(**inputs).logits, model(**inputs).shadow_logits, atol=1e-4)
print(f"{type(small).__name__} of {small.config.num_hidden_layers} layers computes what the attached shadow computes")
