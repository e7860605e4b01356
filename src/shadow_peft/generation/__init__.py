"""Text generation through transformers, with the shadow as draft model of its own base."""
