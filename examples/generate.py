"""Generate with the adapted base, and with the shadow alone, with a KV cache and without.

python examples/generate.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig()), inference_mode="base_shadow").eval()

inputs = tokenizer("The function returns", return_tensors="pt")
settings = {"max_new_tokens": 16, "do_sample": False}

adapted = model.generate(**inputs, **settings)
assert torch.equal(adapted, model.generate(**inputs, **settings, use_cache=False))
print("adapted base:", tokenizer.decode(adapted[0]))

model.set_inference_mode("shadow_only")  # no layer of the base runs
alone = model.generate(**inputs, **settings)
assert torch.equal(alone, model.generate(**inputs, **settings, use_cache=False))
print("shadow alone, untrained:", tokenizer.decode(alone[0]))
