"""Adapters compared on one frozen base: the same trainable size, the same data in the same order, the same tokens.

    python -m benchmarks.quality.tasks            write the tasks' text to benchmarks/quality/data/
    python -m benchmarks.quality.run --method lora --task robot --seed 0 --lr 3e-3
    python -m benchmarks.quality.sweep            every run that is missing: learning rates on dev, then seeds
    python -m benchmarks.quality.table            the table of all runs, Markdown

tasks -> training -> scoring is the path of one run; `methods` builds the contenders. A run is one process and one JSON
below `benchmarks/results/quality/`, and is skipped where its JSON exists.
"""
