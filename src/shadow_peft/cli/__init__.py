"""The command line `shadow-peft`: demo, train, generate, eval; one file per verb."""

from shadow_peft.cli.dispatch import main

__all__ = ["main"]
