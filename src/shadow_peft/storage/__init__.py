"""Atomic writing of files, tensors and the hub; independent of adapters."""
