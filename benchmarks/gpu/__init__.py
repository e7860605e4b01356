"""Everything that is measured on one CUDA GPU, by one command and without a network.

    make wheels WHEELS=folder                            on a machine with a network: packages but torch, base, tasks, text
    make gpu PYTHON=python3 WHEELS=folder                on the one with the GPU, whose python3 has a torch for it
    python -m benchmarks.gpu.run --list                  the steps, and which of them are done
    python -m benchmarks.gpu.run --next                  one of them, in under nine minutes
    python -m benchmarks.gpu.run --toy --device cpu --results folder     all of them at toy sizes; no figure of it counts

A step is done when its JSON is in `benchmarks/results/gpu/`, and is not repeated then. Long ones stop after some minutes and
go on when they are called again. Nothing is measured yet.
"""
