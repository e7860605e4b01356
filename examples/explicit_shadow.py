"""Use your own small model as the shadow; its width differs from the base's.

python examples/explicit_shadow.py
"""

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import AutoModelForCausalLMWithHiddenProjection, ShadowConfig, ShadowForCausalLM, get_shadow_model

base, small = causal_lm(hidden_size=64), causal_lm(hidden_size=32, num_layers=2, seed=1)

# The small model under the base's head: the projection is the least-squares fit of the two heads.
shadow = AutoModelForCausalLMWithHiddenProjection.wrap(
    shadow_model=small,
    shadow_hidden_projection=torch.nn.Linear(32, 64, bias=False),
    lm_head=base.lm_head,
    init_optimal_projection=True,
    reference_lm_head=small.lm_head,
)
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(), shadow_model=shadow)).eval()
model.print_trainable_parameters()

input_ids = token_ids()
with torch.no_grad():
    outputs = model(input_ids=input_ids)
    exported = model.export_shadow()
    assert torch.allclose(exported(input_ids=input_ids).logits, outputs.shadow_logits, atol=1e-5)

generated = exported.generate(input_ids, max_new_tokens=8, do_sample=False)
assert torch.equal(generated, exported.generate(input_ids, max_new_tokens=8, do_sample=False, use_cache=False))
print(type(exported).__name__, generated[0, -8:].tolist())
