"""The shadow drafts and its base verifies: the same tokens with fewer passes of the base.

python examples/draft.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model, prepare_shadow_model
from shadow_peft.demo.embedded import BASE_PATH, SHADOW_PATH  # a base, a pretrained shadow

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
small = AutoModelForCausalLM.from_pretrained(SHADOW_PATH, dtype="float32")
shadow = prepare_shadow_model(small, remove_embed_tokens=True)  # it is fed the base's embeddings
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(), shadow_model=shadow)).eval()

tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
inputs = tokenizer("The function returns", return_tensors="pt")
settings = {"max_new_tokens": 40, "do_sample": False}

expected = model.generate(**inputs, **settings)
output = model.generate(**inputs, **settings, use_shadow_draft=True, return_dict_in_generate=True)
assert torch.equal(output.sequences, expected)

print(tokenizer.decode(expected[0]))
statistics = output.draft_statistics
print(
    f"{statistics.base_passes} passes of the base for {expected.shape[1] - inputs['input_ids'].shape[1]} tokens, "
    f"{statistics.acceptance_rate:.0%} of the drafted ones accepted"
)
