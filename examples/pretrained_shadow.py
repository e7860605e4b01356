"""Pretrain the shadow: initialise it from the base, train it on text like any model, and use it as the shadow.

python examples/pretrained_shadow.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model, prepare_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base in the package; or any other

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
shape = ShadowConfig(num_shadow_layers=2, shadow_init_layers="even", shadow_intermediate_size=128)

small = get_shadow_model(base, shape).export_shadow()  # a stock model, with copies of the base's embeddings and head
for table in (small.get_input_embeddings(), small.get_output_embeddings()):
    table.requires_grad_(False)  # both stay equal to the base's
rows = tokenizer(["Here stands a long text of your own."] * 16)["input_ids"]
text = [{"input_ids": row, "labels": row} for row in rows]

with tempfile.TemporaryDirectory() as directory:
    args = TrainingArguments(directory, max_steps=4, learning_rate=1e-3, report_to="none", save_strategy="no")
    Trainer(small, args, train_dataset=text).train()
    small.save_pretrained(directory)
    shadow = prepare_shadow_model(AutoModelForCausalLM.from_pretrained(directory), remove_embed_tokens=True)

model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(), shadow_model=shadow)).eval()
inputs = tokenizer("Open the door.", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).shadow_logits
    assert torch.allclose(logits, small.eval()(**inputs).logits, atol=1e-4)
print("the adapter starts from the pretrained shadow:", f"{sum(p.numel() for p in shadow.parameters()):,} parameters")
