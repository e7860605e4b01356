"""Save an adapter, load it onto a fresh base, and go on training it.

python examples/save_and_load.py
"""

import os
import tempfile

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

model = ShadowForCausalLM(get_shadow_model(causal_lm(), ShadowConfig(modules_to_save=["lm_head"]))).eval()
with torch.no_grad():  # as if it had been trained
    model.shadow_injection_model.injection_ups.normal_(std=0.1)
    model.get_output_embeddings().weight.mul_(1.1)

with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    print(sorted(os.listdir(directory)))
    loaded = ShadowForCausalLM.from_pretrained(causal_lm(), directory)
    trainable = ShadowForCausalLM.from_pretrained(causal_lm(), directory, is_trainable=True)

input_ids = token_ids()
with torch.no_grad():
    assert torch.equal(model(input_ids=input_ids).logits, loaded(input_ids=input_ids).logits)
loaded.print_trainable_parameters()
trainable.print_trainable_parameters()
