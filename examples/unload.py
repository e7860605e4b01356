"""Disable an adapter for a while, then unload it: the base is what it was, bit for bit.

python examples/unload.py
"""

import torch

from _tiny import causal_lm, token_ids
from shadow_peft import ShadowConfig, get_shadow_model

base, input_ids = causal_lm().eval(), token_ids()
with torch.no_grad():
    bare = base(input_ids=input_ids).logits
    model = get_shadow_model(base, ShadowConfig(alpha=1.0)).eval()
    torch.nn.init.normal_(model.shadow_injection_model.injection_ups)  # as if it had been trained
    adapted = model(input_ids=input_ids).logits
    assert not torch.allclose(bare, adapted)
    assert torch.equal(bare, base(input_ids=input_ids).logits), "calling the base is calling the bare base"

    with model.disable_adapter():
        assert torch.equal(bare, model(input_ids=input_ids).logits)
    assert torch.equal(adapted, model(input_ids=input_ids).logits)

    assert model.unload() is base
    assert torch.equal(bare, base(input_ids=input_ids).logits)
print("the base gives its own logits again, bit for bit")
