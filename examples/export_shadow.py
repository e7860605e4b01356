"""Export the shadow as a model of its own, and load it in another process without its base.

python examples/export_shadow.py
"""

import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[1] + "/inputs.st")).logits}, sys.argv[1] + "/logits.st")
assert "shadow_peft" not in sys.modules  # a shadow as wide as its base is a stock model of the base's architecture
"""

model = ShadowForCausalLM(get_shadow_model(causal_lm(), ShadowConfig(num_shadow_layers=2))).eval()
inputs = {"input_ids": token_ids()}
with torch.no_grad():
    expected = model(**inputs).shadow_logits

with tempfile.TemporaryDirectory() as directory:
    model.export_shadow().save_pretrained(directory)
    save_file(inputs, f"{directory}/inputs.st")
    subprocess.run([sys.executable, "-c", RELOAD, directory], check=True)
    assert torch.allclose(load_file(f"{directory}/logits.st")["logits"], expected, atol=1e-5)
print("the reloaded shadow computes the same logits")
