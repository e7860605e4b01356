"""Save an adapter, load it onto a fresh base, and go on training it.

python examples/save_and_load.py
"""

import os
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import AutoShadowModelForCausalLM, ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(modules_to_save=["lm_head"]))).eval()
with torch.no_grad():  # as if it had been trained
    model.shadow_injection_model.injection_ups.normal_(std=0.1)
    model.get_output_embeddings().weight.mul_(1.1)

with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    print(sorted(os.listdir(directory)))
    another = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
    loaded = ShadowForCausalLM.from_pretrained(another, directory)
    # the shortest way: the adapter names its base, which is loaded too
    trainable = AutoShadowModelForCausalLM.from_pretrained(directory, dtype="float32", is_trainable=True)

inputs = AutoTokenizer.from_pretrained(BASE_PATH)("Open the door.", return_tensors="pt")
with torch.no_grad():
    expected = model(**inputs).logits
    assert torch.equal(expected, loaded(**inputs).logits)
    assert torch.equal(expected, trainable.eval()(**inputs).logits)
loaded.print_trainable_parameters()
trainable.print_trainable_parameters()
