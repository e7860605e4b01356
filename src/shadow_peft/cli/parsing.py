"""What all verbs' parsers share: options are fields of dataclasses, examples are printed below the help."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from typing import Any

import yaml
from trl import TrlParser

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.spelling import split_config


class HelpFormat(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the default of every option, and the examples as they are written."""


def make_parser(verb: str, options: list[type], description: str, examples: str) -> TrlParser:
    """A parser whose options are the fields of dataclasses; `--config file.yaml` sets them too."""
    return TrlParser(
        options, prog=f"shadow-peft {verb}", description=description, epilog=examples, formatter_class=HelpFormat
    )


def parse(parser: TrlParser, arguments: list[str]) -> tuple[Any, ...]:
    """One object per dataclass, followed by a namespace if the parser has positional arguments.

    Raises:
        UserError: a value that a dataclass refuses, or a config file that is no YAML.
    """
    try:
        return tuple(parser.parse_args_and_config(split_config(arguments)))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(str(error)) from error
