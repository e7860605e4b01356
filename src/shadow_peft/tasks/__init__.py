"""Task models: an adapted base and its shadow with heads and a loss."""
