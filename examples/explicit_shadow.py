"""Use your own small model as the shadow; its width differs from the base's.

python examples/explicit_shadow.py
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shadow_peft import AutoModelForCausalLMWithHiddenProjection, ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
# Random weights, to show the sizes. Yours would be a pretrained small model with the base's tokenizer.
small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE_PATH, hidden_size=96, num_hidden_layers=2)).float()

# The small model under the base's head: the projection is the least-squares fit of the two heads.
shadow = AutoModelForCausalLMWithHiddenProjection.wrap(
    shadow_model=small,
    shadow_hidden_projection=torch.nn.Linear(96, base.config.hidden_size, bias=False),
    lm_head=base.lm_head,
    init_optimal_projection=True,
    reference_lm_head=small.lm_head,
)
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(), shadow_model=shadow)).eval()
model.print_trainable_parameters()

inputs = tokenizer("Open the door.", return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
    exported = model.export_shadow()
    assert torch.allclose(exported(**inputs).logits, outputs.shadow_logits, atol=1e-4)
print("exported:", type(exported).__name__, f"{exported.num_parameters():,} parameters")
