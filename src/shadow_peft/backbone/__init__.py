"""The shadow backbone: built from the base, or given by the user."""
