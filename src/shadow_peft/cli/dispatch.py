"""Finds the verb and runs it. A mistake of the user is one clear message and exit status 1, or 2 for an unknown name.

Nothing here imports torch, so help, version and a mistyped option are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import shadow_peft
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.spelling import complaint

#: Verb -> what it does. Each is a module of this package with a function `run(arguments)`.
VERBS = {
    "demo": "fine-tune an embedded model on an embedded task, offline, and compare with LoRA",
    "train": "fine-tune a causal language model on your own data or a dataset of the hub, with a shadow or LoRA",
    "generate": "continue a text with a model, with or without its shadow adapter",
    "eval": "score a model, its shadow adapter or the shadow alone with lm-evaluation-harness",
}

#: Verb -> the extra of this package that it needs.
EXTRAS = {"demo": "demo", "train": "train", "generate": "train", "eval": "eval"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point `shadow-peft`.

    Args:
        arguments: a verb and its options; None uses those of the process.

    Returns:
        The exit status: 0 for success, 1 for a mistake of the user, 2 for an unknown verb or option.
    """
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(overview())
        return 0
    if verb == "--version":
        print(f"shadow-peft {shadow_peft.__version__}")
        return 0
    if verb not in VERBS:
        print(f"shadow-peft: there is no verb {verb!r}\n\n{overview()}", file=sys.stderr)
        return 2
    mistyped = complaint(verb, rest)
    if mistyped is not None:
        print(mistyped, file=sys.stderr)
        return 2
    return _run(verb, rest)


def overview() -> str:
    """The usage text: the verbs and what they do."""
    lines = [f"  {verb:<10}{purpose}" for verb, purpose in VERBS.items()]
    usage = "usage: shadow-peft VERB [options]   (VERB --help shows the options, --version the version)"
    return "\n".join([usage, "", *lines])


def _run(verb: str, arguments: list[str]) -> int:
    try:
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
