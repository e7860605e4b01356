"""Finds the verb and runs it. A mistake of the user is one clear message and exit status 1, or 2 for an unknown name.

Nothing here imports torch, so help, version and a mistyped option are answered at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import shadow_peft
from shadow_peft.cli.errors import InterruptedRunError, UserError, one_line
from shadow_peft.cli.spelling import complaint

#: Verb -> what it does. Each is a module of this package with a function `run(arguments)`.
VERBS = {
    "demo": "fine-tune an embedded model offline, and compare with LoRA",
    "train": "fine-tune a language model or classifier with a shadow or LoRA",
    "pretrain": "train a shadow for a base on plain text, as a standalone model",
    "generate": "continue a text with a model, with or without its shadow adapter",
    "classify": "tell the class of a text with a classifier, with or without adapter",
    "export": "write the shadow of an adapter as a standalone model",
    "convert": "write an adapter for peft, or one of peft's for this library",
    "eval": "score a model or its shadow with lm-evaluation-harness",
    "cascade": "answer with the shadow, and ask the base or a remote model only where it is unsure",
    "serve": "serve one base with many adapters to clients of OpenAI's API",
    "playground": "compare base, shadow and drafts side by side in the browser",
}

#: Verb -> the extra of this package that it needs to be imported; `playground` asks for its own.
EXTRAS = {"demo": "demo", "train": "train", "pretrain": "train", "eval": "eval", "cascade": "cascade", "serve": "serve"}

TRACEBACK = "SHADOW_PEFT_TRACEBACK"
"""Variable of the environment: set to anything, it makes the errors that are one line a traceback, too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point `shadow-peft`.

    Args:
        arguments: a verb and its options; None uses those of the process.

    Returns:
        The exit status: 0 for success, 1 for a mistake of the user, 2 for an unknown verb or option, 130 for Ctrl-C.

    Raises:
        SystemExit: from the parser of a verb, after its help (status 0) or a value that does not fit (2).
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
    lines = [f"  {verb:<12}{purpose}" for verb, purpose in VERBS.items()]
    usage = "usage: shadow-peft VERB [options]"
    more = "shadow-peft VERB --help shows the options, shadow-peft --version the version."
    return "\n".join([usage, "", *lines, "", more])


def _run(verb: str, arguments: list[str]) -> int:
    try:
        return _import_and_run(verb, arguments)
    except BrokenPipeError:  # whoever read the output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        text = str(error) if isinstance(error, UserError) else one_line(error)
        print(f"shadow-peft {verb}: {text}", file=sys.stderr)
        return error.status if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"shadow-peft {verb}: interrupted", file=sys.stderr)
        return InterruptedRunError.status


def _import_and_run(verb: str, arguments: list[str]) -> int:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries draw no bars into a pipe; tqdm reads it when it is imported
    logging.disable(logging.WARNING)  # of what libraries remark while they are imported, such as missing kernels
    try:
        module = import_module(f"shadow_peft.cli.{verb}")
    except ImportError as error:
        if verb not in EXTRAS:
            raise
        raise UserError(f"{error}; install the extras: pip install 'shadow-peft[{EXTRAS[verb]}]'") from error
    finally:
        logging.disable(logging.NOTSET)
    module.run(arguments)
    return 0
