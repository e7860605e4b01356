"""Attach a fresh shadow to a base and print what would be trained.

python examples/attach.py
"""

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, get_shadow_model

base = causal_lm()
input_ids = token_ids()
base.eval()
with torch.no_grad():
    before = base(input_ids=input_ids).logits

config = ShadowConfig(num_shadow_layers=1, injection_hidden_size=16, gate_hidden_size=10, alpha=0.1, dropout=0.2)
model = get_shadow_model(base, config)
model.print_trainable_parameters()

with torch.no_grad():
    after = model(input_ids=input_ids).logits
assert torch.allclose(before, after, atol=1e-5), "a fresh shadow changes nothing"
print("a fresh shadow leaves the logits as they were")
