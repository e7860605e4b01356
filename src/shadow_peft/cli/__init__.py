"""The command line `shadow-peft`: one file per verb, its options in a file beside it."""

from shadow_peft.cli.dispatch import main

__all__ = ["main"]
