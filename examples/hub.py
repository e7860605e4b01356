"""Push an adapter to the hub and load it from there. Needs an account: `hf auth login` first.

python examples/hub.py you/my-shadow
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("repo_id")
parser.add_argument("--revision", help="branch to push to, made if it is missing")
parser.add_argument("--public", action="store_true")
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig())).eval()
torch.nn.init.normal_(model.shadow_injection_model.injection_ups, std=0.1)  # as if it had been trained
print(model.push_to_hub(options.repo_id, private=not options.public, revision=options.revision))

where = f"{options.repo_id}@{options.revision}" if options.revision else options.repo_id
another = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
loaded = ShadowForCausalLM.from_pretrained(another, where)
inputs = AutoTokenizer.from_pretrained(BASE_PATH)("Open the door.", return_tensors="pt")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
print(f"{where} gives the same logits")
