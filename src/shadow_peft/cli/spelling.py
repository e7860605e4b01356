"""Reports an unknown option at once, before transformers is imported, which does the real parsing."""

from __future__ import annotations

from argparse import ArgumentParser
from difflib import get_close_matches
from typing import NoReturn

from shadow_peft.cli.declared_fields import DeclaredField, fields_in_source, fields_of
from shadow_peft.cli.options import OPTIONS, TRL_OPTIONS

CONFIG = "--config"
"""The option of every verb that names a file of options."""

HELP_ALL = ("--help-all", "--help_all")
"""The option of every verb that shows all others."""


class _RefusedError(Exception):
    """argparse refused the arguments; with names alone it refuses ambiguous prefixes only."""


class _NamesParser(ArgumentParser):
    """A parser that knows the names of options, but neither their types nor their numbers of values."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise _RefusedError(message)


def complaint(verb: str, arguments: list[str]) -> str | None:
    """Three lines about unknown options of a verb; None if there are none, or if TRL's options cannot be read.

    Args:
        verb: name of the verb.
        arguments: the arguments after it on the command line.
    """
    try:
        fields = declared_fields(verb)
    except (LookupError, OSError, ValueError, SyntaxError):
        return None  # TRL is missing, or its source cannot be read: its own parser decides
    wrong = _unknown(names_parser(fields), arguments)
    if not wrong:
        return None
    known = [CONFIG, *(f"--{f.name}" for f in fields), *(f"--no_{f.name}" for f in fields if f.is_true)]
    close = list(dict.fromkeys(name for word in wrong for name in nearest(word, known)))[:3]
    return (
        f"shadow-peft {verb}: there is no option {', '.join(wrong)}\n"
        f"nearest: {', '.join(close) or 'none is spelled like it'}\n"
        f"all options: shadow-peft {verb} --help"
    )


def declared_fields(verb: str) -> list[DeclaredField]:
    """The fields of all dataclasses that define the options of a verb.

    Raises:
        LookupError, OSError, ValueError, SyntaxError: those of TRL cannot be read.
    """
    ours = [field for options in OPTIONS[verb] for field in fields_of(options)]
    return ours + [field for name in TRL_OPTIONS.get(verb, []) for field in fields_in_source("trl", name)]


def names_parser(fields: list[DeclaredField]) -> ArgumentParser:
    """A parser of the options that a verb's parser makes from these fields, in all their spellings."""
    parser = _NamesParser(add_help=False, conflict_handler="resolve")
    parser.add_argument("-h", "--help", *HELP_ALL, action="store_true", dest="help")
    parser.add_argument(CONFIG, nargs="*")
    parser.add_argument("positional", nargs="*")
    for field in fields:
        dashed = field.name.replace("_", "-")
        parser.add_argument(*dict.fromkeys([f"--{field.name}", f"--{dashed}"]), *field.aliases, nargs="*")
        if field.is_true:
            parser.add_argument(f"--no_{field.name}", f"--no-{dashed}", nargs="*")
    return parser


def _unknown(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """The names of unknown options among the arguments; none if help is asked for.

    argparse tells options from values by looking at one argument at a time, so each is checked alone.
    """
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    unknown = []
    for argument in arguments:
        try:
            found, rest = parser.parse_known_args([argument])
        except _RefusedError:
            rest = [argument]
        else:
            if found.help:
                return []
        if rest and not _is_number(argument):
            unknown.append(argument.partition("=")[0])
    return unknown


def nearest(word: str, known: list[str]) -> list[str]:
    """Up to three options that begin with a word, or else are spelled like it, the most similar first."""
    name = f"--{word.lstrip('-').replace('-', '_').lower()}"
    longer = [option for option in known if option.startswith(name)]
    return get_close_matches(name, longer, cutoff=0) or get_close_matches(name, known)


def _is_number(argument: str) -> bool:
    """Whether it is a number such as -1e-3, which argparse mistakes for an option and reports by itself."""
    try:
        float(argument)
    except ValueError:
        return False
    return True
