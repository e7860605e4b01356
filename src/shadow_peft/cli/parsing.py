"""What every verb's parser shares: dataclasses are the options, the examples stand below the help."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from typing import Any

import yaml
from trl import TrlParser

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.spelling import split_config


class HelpFormat(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults behind every option, the examples as they are written."""


def make_parser(verb: str, options: list[type], description: str, examples: str) -> TrlParser:
    """A parser whose options are the fields of dataclasses; `--config file.yaml` sets them, too."""
    return TrlParser(
        options, prog=f"shadow-peft {verb}", description=description, epilog=examples, formatter_class=HelpFormat
    )


def parse(parser: TrlParser, arguments: list[str]) -> tuple[Any, ...]:
    """One object per dataclass, then, if the parser has positional arguments, their namespace.

    Raises:
        UserError: a value that a dataclass refuses, or a file of options that is no YAML.
    """
    try:
        return tuple(parser.parse_args_and_config(split_config(arguments)))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(str(error)) from error
