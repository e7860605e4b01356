"""Generate with the adapted base, and with the shadow alone, with a KV cache and without.

python examples/generate.py
"""

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

model = ShadowForCausalLM(get_shadow_model(causal_lm(), ShadowConfig()), inference_mode="base_shadow").eval()
prompt = token_ids(rows=1, length=6)
settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}

adapted = model.generate(prompt, **settings)
assert torch.equal(adapted, model.generate(prompt, **settings, use_cache=False))
print("adapted base:", adapted[0, 6:].tolist())

model.set_inference_mode("shadow_only")  # no layer of the base runs
alone = model.generate(prompt, **settings)
assert torch.equal(alone, model.generate(prompt, **settings, use_cache=False))
print("shadow alone:", alone[0, 6:].tolist())
