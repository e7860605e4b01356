"""Where a shadow may start from: what each starting point is worth before and after fine-tuning, on the demo's base.

    python scripts/registry_text.py --output corpus                             the text
    while python -m benchmarks.starting_points --corpus corpus --next; do :; done    all runs of the plan
    python -m benchmarks.starting_points.report                                 table and picture of docs/pretraining.md

random       random weights
base layers  layers of the base, and of these the strongest neurons and heads
next token   the same, pretrained on text by next-token loss
distilled    the same, pretrained on the same text by the base's distribution

All have the shape of the demo's embedded shadow. The two pretrained ones read the same tokens in the same order; each seed
reads another stretch of the text, and all are measured on the same blocks, which none of them reads. Then each is
fine-tuned as `shadow-peft demo` does it but in 400 steps, on the same commands, once with each rate of the backbone in
`SCALES`; the table takes for each starting point the one with the lower loss on the dev split.

`cell` is one run: a starting point and a seed in, one JSON out. `plan` says which are missing, `report` shows what is there.
"""
