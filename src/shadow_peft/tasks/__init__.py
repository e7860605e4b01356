"""Task models: an adapted base and its shadow with task heads and a loss."""
