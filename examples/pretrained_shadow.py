"""Pretrain the shadow: layers of the base that learn its distribution, then serves as the shadow of an adapter.

python examples/pretrained_shadow.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model, prepare_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other
from shadow_peft.pretraining.shadows import implicit_shadow
from shadow_peft.pretraining.student import Objective, Student
from shadow_peft.pretraining.trainer import finished

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
text = tokenizer(["Here stands a long text of your own."] * 8, return_tensors="pt")["input_ids"]
config = ShadowConfig(num_shadow_layers=2, shadow_init="base", shadow_init_layers="0,3", shadow_intermediate_size=128)

student = Student(implicit_shadow(base, config), Objective(next_token=0.0, distillation=1.0)).train()
optimizer = torch.optim.AdamW(student.trained().values(), lr=1e-3)  # the shadow's layers; embeddings and head are the base's
for _ in range(10):
    loss = student(text)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

small = finished(student).eval()  # a stock model of its own
with tempfile.TemporaryDirectory() as directory:
    small.save_pretrained(directory)
    shadow = prepare_shadow_model(AutoModelForCausalLM.from_pretrained(directory), remove_embed_tokens=True)

model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(), shadow_model=shadow)).eval()
with torch.no_grad():
    assert torch.allclose(model(input_ids=text).shadow_logits, small(input_ids=text).logits, atol=1e-4)
print(f"KL(base || shadow) {loss:.4f} nats; {sum(p.numel() for p in shadow.parameters()):,} parameters start the adapter")
