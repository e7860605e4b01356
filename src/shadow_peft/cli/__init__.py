"""The command line: `shadow-peft demo`, `shadow-peft train`, `shadow-peft generate`; one file per verb."""

from shadow_peft.cli.dispatch import main

__all__ = ["main"]
