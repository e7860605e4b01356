"""The shadow on its own: models that no longer need their base."""
