"""The runtimes that a shadow is exported to."""
