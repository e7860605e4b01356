"""Classify sequences; padding may be on either side.

python examples/sequence_classification.py
"""

import torch

from _tiny import classifier, token_ids
from shadow_peft import ShadowConfig, ShadowForSequenceClassification, get_shadow_model

model = ShadowForSequenceClassification(get_shadow_model(classifier(num_labels=3), ShadowConfig()))
model.print_trainable_parameters()  # both classification heads are trained and saved with the adapter

input_ids = token_ids(rows=2)
attention_mask = torch.ones_like(input_ids)
input_ids[1, -4:], attention_mask[1, -4:] = 0, 0
outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=torch.tensor([0, 2]))
outputs.loss.backward()
print(f"loss {outputs.loss.item():.3f}, logits {tuple(outputs.logits.shape)}")

model.eval()
with torch.no_grad():
    right = model(input_ids=input_ids, attention_mask=attention_mask).logits[1]
    left = model(input_ids=input_ids[1:].roll(4, 1), attention_mask=attention_mask[1:].roll(4, 1)).logits[0]
assert torch.allclose(left, right, atol=1e-5), "the side of the padding does not matter"
