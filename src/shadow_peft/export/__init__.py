"""Exports the shadow as a model that no longer needs its base."""
