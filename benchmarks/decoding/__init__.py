"""How fast an adapted base decodes, beside the bare base and the peers; see `benchmarks.decoding.run`."""
