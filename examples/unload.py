"""Disable an adapter for a while, then unload it: the base is what it was, bit for bit.

python examples/unload.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32").eval()
inputs = AutoTokenizer.from_pretrained(BASE_PATH)("Open the door.", return_tensors="pt")
with torch.no_grad():
    bare = base(**inputs).logits
    model = get_shadow_model(base, ShadowConfig(alpha=1.0)).eval()
    torch.nn.init.normal_(model.shadow_injection_model.injection_ups)  # as if it had been trained
    adapted = model(**inputs).logits
    assert not torch.allclose(bare, adapted)
    assert torch.equal(bare, base(**inputs).logits), "calling the base is calling the bare base"

    with model.disable_adapter():
        assert torch.equal(bare, model(**inputs).logits)
    assert torch.equal(adapted, model(**inputs).logits)

    assert model.unload() is base
    assert torch.equal(bare, base(**inputs).logits)
print("the base gives its own logits again, bit for bit")
