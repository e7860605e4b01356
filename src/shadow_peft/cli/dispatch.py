"""Finds the verb and runs it; users' mistakes become one clear message and exit status 1."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

#: Verb -> what it does. Each is a module of this package with a function `run(arguments)`.
VERBS = {
    "demo": "fine-tune an embedded model on an embedded task, offline, and race LoRA",
    "train": "fine-tune any causal language model on data of yours or of the hub, with a shadow or LoRA",
    "generate": "let a model, with or without its shadow adapter, go on with a text",
    "eval": "score a model, with its shadow or as the shadow alone, by lm-evaluation-harness",
}

#: Verb -> the extra of this package that it needs.
EXTRAS = {"demo": "demo", "train": "train", "generate": "train", "eval": "eval"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point `shadow-peft`.

    Args:
        arguments: a verb and its options; None takes those of the process.

    Returns:
        The exit status: 0 for success, 1 for a mistake of the user's, 2 for an unknown verb or option.
    """
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(overview())
        return 0
    if verb not in VERBS:
        print(f"shadow-peft: there is no verb {verb!r}\n\n{overview()}", file=sys.stderr)
        return 2
    return _run(verb, rest)


def overview() -> str:
    """The verbs and what they do."""
    lines = [f"  {verb:<10}{purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(["usage: shadow-peft VERB [options]   (VERB --help shows the options)", "", *lines])


def _run(verb: str, arguments: list[str]) -> int:
    try:
        from shadow_peft.cli.parsing import UserError

        module = import_module(f"shadow_peft.cli.{verb}")
    except ImportError as error:
        extra = EXTRAS[verb]
        print(f"shadow-peft {verb}: {error}; install the extras: pip install 'shadow-peft[{extra}]'", file=sys.stderr)
        return 1
    try:
        module.run(arguments)
    except (UserError, OSError) as error:
        print(f"shadow-peft {verb}: {error}", file=sys.stderr)
        return 1
    return 0
