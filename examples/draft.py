"""The shadow drafts and its base verifies: the same tokens with fewer passes of the base.

python examples/draft.py
"""

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

# A fresh shadow with copies of all layers is its base, so it guesses right. A trained one guesses as well as it has learned.
model = ShadowForCausalLM(get_shadow_model(causal_lm(), ShadowConfig(num_shadow_layers=4, shadow_init="base"))).eval()
prompt = token_ids(rows=1, length=6)
settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}

expected = model.generate(prompt, **settings)
# By default the length adapts to what is accepted and to what passes take; fixed, the counts below are the same in every run.
fixed = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
output = model.generate(prompt, **settings, use_shadow_draft=True, return_dict_in_generate=True, **fixed)
assert torch.equal(output.sequences, expected)

statistics = output.draft_statistics
print(
    f"{statistics.base_passes} passes of the base for {expected.shape[1] - prompt.shape[1]} tokens, "
    f"{statistics.acceptance_rate:.0%} of the drafted ones accepted"
)
