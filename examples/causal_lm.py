"""Train a causal language model and its shadow by hand.

python examples/causal_lm.py
"""

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

model = ShadowForCausalLM(get_shadow_model(causal_lm(), ShadowConfig()), shadow_loss_weight=0.05)
input_ids = token_ids()
attention_mask = torch.ones_like(input_ids)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

model.train()
losses = []
for step in range(10):
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids)  # no logits, unless asked for
    outputs.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(outputs.loss.item())
    print(f"step {step}: loss {losses[-1]:.3f}")

outputs = model.eval()(input_ids=input_ids, attention_mask=attention_mask)
print("logits of the adapted base", tuple(outputs.logits.shape), "and of the shadow", tuple(outputs.shadow_logits.shape))
assert losses[-1] < losses[0]
