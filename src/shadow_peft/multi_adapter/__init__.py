"""Several named adapters on one base: switching between them, and batches whose rows belong to different ones.

The modules of this package:

    exchange     a model is its active adapter; the parts of two adapters are exchanged, and what is trained follows
    named        add, load, switch, replace, sum and delete named adapters
    files        saving them into folders of their names
    batches      the names of a batch's rows, and the caches of their adapters
    mixed        the adapters of one call: backbones on their rows, one coupling for all
    coupling     that coupling: groups of rows, with batched products where a group has several adapters
    weights      the stacked weights of a group
    row_caches   the backbones' caches of a batch as one cache
    rows         selecting rows, and merging them
    hotswap      what must agree where stored weights replace others in place
    weighted     the weighted sum of adapters
    pool         stored adapters, a bounded number of them in memory
"""
