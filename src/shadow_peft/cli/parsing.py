"""The parser of every verb: fields of dataclasses are the options, a YAML file may set them, errors are two lines."""

from __future__ import annotations

import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.help import HelpFormat, documented, is_switch, sections
from shadow_peft.cli.sections import TEXTS
from shadow_peft.cli.spelling import CONFIG, HELP_ALL, nearest

_TRUE_OR_FALSE = ("true", "false")
_BOOLEANS = (*_TRUE_OR_FALSE, "yes", "no", "y", "n", "t", "f", "1", "0")


class VerbParser(HfArgumentParser):
    """transformers' parser of dataclasses, for a verb.

    A switch takes no value, so that the word behind it is a word of its own: `--chat "Hello"`. Its value may be spelled out
    all the same, `--chat=True` everywhere and `--chat True` where no text can be meant: `yes`, `no`, `1`, `0` and the like
    are values of a switch only for verbs without positional arguments.

    Args:
        verb: name of the verb, a key of `sections.SECTIONS`.
        options: dataclasses.
        description: what the verb does.
        examples: stands below the help.
    """

    def __init__(self, verb: str, options: Sequence[type], description: str, examples: str) -> None:
        self.verb = verb
        super().__init__(
            list(options),
            prog=f"shadow-peft {verb}",
            description=description,
            epilog=examples,
            formatter_class=HelpFormat,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", default=SUPPRESS, help="Show what most runs need, and leave.")
        self.add_argument(*HELP_ALL, action=_HelpAll, nargs=0, default=SUPPRESS, help="Show every option, and leave.")
        self.add_argument(CONFIG, metavar="FILE", help="YAML file of options; those on the command line override it.")
        from_docstrings = {name: text for cls in options for name, text in documented(cls).items()}
        short = TEXTS if verb == "train" else {}
        for action in self._actions:
            action.help = short.get(action.dest) or action.help or from_docstrings.get(action.dest)
            if is_switch(action):  # transformers wants a value where the default is None
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in two lines, without the usage of all options, and leave with status 2."""
        print(f"{self.prog}: {_shortened(message)}\nall options: {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def format_help(self) -> str:
        """The description, the sections with the options that most runs need, the examples."""
        return self.format_sections(everything=False)

    def format_sections(self, everything: bool) -> str:
        """The help; with `everything`, also the options that no section names."""
        formatter = self._get_formatter()
        words = [a for a in self._actions if not a.option_strings]
        required = [a for a in self._actions if a.required and a.option_strings]
        usage = [
            *(f"--{a.dest} {a.dest.upper()}" for a in required),
            "[options]",
            *(a.dest + " ..." * (a.nargs == "+") for a in words),
        ]
        formatter.add_usage(f"%(prog)s {' '.join(usage)}", [], [])
        formatter.add_text(self.description)
        if words:
            formatter.start_section(words[0].dest)
            formatter.add_arguments(words)
            formatter.end_section()
        shown = sections(self.verb, self._actions, list(self.dataclass_types), everything)
        for title, actions in shown.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text("Words of an option may be joined by - as well as by _. A switch needs no value.")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What `ArgumentParser` makes of the arguments, once every switch has its value."""
        return super().parse_known_args(self._with_values(list(args)), namespace)

    def read_config(self, path: str) -> None:
        """Make the values of a YAML file the defaults; `env` in it sets variables of the environment.

        Raises:
            UserError: the file is no mapping of options, or a value does not fit its option.
            OSError: it cannot be read.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {one_line(error)}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} must be a YAML mapping of options, it is a {type(values).__name__}")
        variables = values.pop("env", {})
        if not isinstance(variables, dict):
            raise UserError(f"{path}: env must be a mapping of variables")
        known = {a.dest for a in self._actions if a.option_strings and a.default is not SUPPRESS and a.dest != "config"}
        for name in values:
            if name not in known:
                close = ", ".join(nearest(str(name), [f"--{option}" for option in known])) or "none is spelled like it"
                raise UserError(f"{path}: there is no option {name}; nearest: {close.replace('--', '')}")
        self._set_defaults(values, path)
        os.environ.update({str(name): str(value) for name, value in variables.items()})

    def _set_defaults(self, values: Mapping[str, Any], path: str) -> None:
        takes_dict = self._options_of_dicts()
        for action in [a for a in self._actions if a.dest in values]:
            given = values[action.dest]
            if given is None or (isinstance(given, dict) and action.dest in takes_dict) or given == []:
                value = given
            elif action.nargs == 0:  # of `--no_x` the default alone, which is that of `--x`
                value = self._typed(next(a for a in self._actions if a.dest == action.dest), given, path)
            else:
                value = self._typed(action, given, path)
            action.default = value
            action.required = action.required and given is None

    def _typed(self, action: Action, given: Any, path: str) -> Any:
        """A value of a file as the option takes it from the command line."""
        items = given if isinstance(given, list) and action.nargs == "+" else [given]
        wrong = next((item for item in items if isinstance(item, (list, dict)) or item is None), None)
        try:
            if wrong is not None:
                raise ArgumentError(action, f"invalid value: {given!r}")
            return self._get_values(action, [str(item) for item in items])
        except ArgumentError as error:
            raise UserError(f"{path}: {action.dest}: {_shortened(error.message)}") from error

    def _options_of_dicts(self) -> set[str]:
        hints = {name: hint for cls in self.dataclass_types for name, hint in get_type_hints(cls).items()}
        return {
            name for name, hint in hints.items() if any(str(kind).startswith(_DICTS) for kind in (hint, *get_args(hint)))
        }

    def _with_values(self, arguments: list[str]) -> list[str]:
        """The arguments with `--switch` and `--switch VALUE` as `--switch=VALUE`."""
        values = _TRUE_OR_FALSE if any(not a.option_strings for a in self._actions) else _BOOLEANS
        end = arguments.index("--") if "--" in arguments else len(arguments)
        done: list[str] = []
        waiting = arguments[:end]
        while waiting:
            argument = waiting.pop(0)
            if self._names_switch(argument):
                spelled = bool(waiting) and waiting[0].lower() in values
                argument = f"{argument}={waiting.pop(0) if spelled else True}"
            done.append(argument)
        return done + arguments[end:]

    def _names_switch(self, argument: str) -> bool:
        """Whether an argument is a switch, perhaps shortened, without its value."""
        if not argument.startswith("--"):
            return False
        exact = self._option_string_actions.get(argument)
        meant = [exact] if exact else [a for name, a in self._option_string_actions.items() if name.startswith(argument)]
        return bool(meant) and all(a is meant[0] for a in meant) and is_switch(meant[0])


_DICTS = ("<class 'dict'>", "dict[")


class _HelpAll(Action):
    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, VerbParser)
        print(parser.format_sections(everything=True))
        parser.exit(0)


def parse(parser: VerbParser, arguments: list[str]) -> tuple[Any, ...]:
    """One object per dataclass, then the namespace of what belongs to none.

    Raises:
        UserError: a value that a dataclass refuses, or a file of options with a mistake in it.
        SystemExit: a value that is none of its option's; the message is printed.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.startswith("--") and value == "--":  # of which argparse makes an empty list
            parser.error(f"argument {name}: -- is no value")
    config = _config_of(parser, arguments)
    if config is not None:
        parser.read_config(config)
    try:
        *objects, namespace, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, LookupError, AttributeError) as error:
        raise UserError(one_line(error)) from error
    if unknown:
        parser.error(f"nothing takes {' '.join(map(repr, unknown))}")
    assert isinstance(namespace, Namespace)
    return (*objects, namespace)


def _config_of(parser: VerbParser, arguments: list[str]) -> str | None:
    """The file of options, unless help is asked for."""
    if {"-h", "--help", *HELP_ALL} & set(arguments):
        return None
    finder = ArgumentParser(add_help=False)
    finder.error = parser.error  # type: ignore[method-assign]
    finder.add_argument(CONFIG)
    config: str | None = finder.parse_known_args(arguments)[0].config
    return config


def _shortened(message: str) -> str:
    """The message of argparse; of many choices those that are spelled most like what was given."""
    found = re.fullmatch(r"(.*invalid choice: (.*) )\(choose from (.*)\)", message, re.DOTALL)
    if found is None:
        return " ".join(message.split())
    said, given, choices = found.group(1), found.group(2), [c.strip("' ") for c in found.group(3).split(",")]
    if len(choices) > 10:
        close = nearest(given.strip("'"), [f"--{choice}" for choice in choices]) or [f"--{choice}" for choice in choices[:3]]
        return f"{said}(nearest: {', '.join(c.removeprefix('--') for c in close)})"
    return f"{said}(choose from {', '.join(choices)})"
