"""Push an adapter to the hub and load it from there. Needs an account: `hf auth login` first.

python examples/hub.py you/my-shadow
"""

import argparse

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("repo_id")
parser.add_argument("--revision", help="branch to push to, made if it is missing")
parser.add_argument("--public", action="store_true")
options = parser.parse_args()

model = ShadowForCausalLM(get_shadow_model(causal_lm(), ShadowConfig())).eval()
torch.nn.init.normal_(model.shadow_injection_model.injection_ups, std=0.1)  # as if it had been trained
print(model.push_to_hub(options.repo_id, private=not options.public, revision=options.revision))

where = f"{options.repo_id}@{options.revision}" if options.revision else options.repo_id
loaded = ShadowForCausalLM.from_pretrained(causal_lm(), where)
with torch.no_grad():
    assert torch.equal(model(input_ids=token_ids()).logits, loaded(input_ids=token_ids()).logits)
print(f"{where} gives the same logits")
