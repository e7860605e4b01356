"""Several named adapters on one base: switching between them, and batches whose rows belong to different ones.

The modules of this package:

    exchange     a model is its active adapter; the parts of two adapters are exchanged, and what is trained follows
    named        add, load, switch, replace, delete and save named adapters
"""
