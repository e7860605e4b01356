"""What `--help` shows: options in sections, each with its text and its default."""

from __future__ import annotations

import dataclasses
import inspect
import re
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from enum import Enum
from typing import Any

from transformers.hf_argparser import string_to_bool

from shadow_peft.cli.sections import SECTIONS

MOST_CHOICES = 6
"""Of more choices the help says the names below, and not in the line of the option."""


class HelpFormat(RawDescriptionHelpFormatter):
    """One spelling of each option, switches without a value, defaults; descriptions and examples as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = action.option_strings[: 2 if action.option_strings[0] == "-h" else 1]
        if is_switch(action):
            off = f", --no_{action.dest}" if action.default is True else ""
            return f"{', '.join(names)}{off}"
        value = "" if action.nargs == 0 else f" {_metavar(action)}" + (" ..." if action.nargs == "+" else "")
        return f"{', '.join(names)}{value}"

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").strip().rstrip(".")
        text = text[:1].upper() + text[1:]
        if action.choices is not None and _metavar(action) == "NAME":
            text += f": {', '.join(map(str, action.choices))}"
        said = "by default" in text or action.required or action.default is SUPPRESS or action.nargs == 0
        if said or not action.option_strings:
            return f"{text}."
        return f"{text} (default: {_shown(action)})."


def sections(verb: str, actions: list[Action], dataclasses_: list[type], everything: bool) -> dict[str, list[Action]]:
    """Title -> the options below it, in the order of `SECTIONS`; then, with `everything`, the rest of each dataclass."""
    by_name = {a.dest: a for a in reversed(actions) if a.option_strings}  # of --x and --no_x, the first
    shown = {title: [by_name[name] for name in names if name in by_name] for title, names in SECTIONS[verb].items()}
    named = {name for names in SECTIONS[verb].values() for name in names}
    if everything:
        for cls in dataclasses_:
            rest = [by_name[f.name] for f in dataclasses.fields(cls) if f.init and f.name not in named]
            if rest:
                shown[f"further options of {cls.__name__}"] = rest
    unnamed = any(f.init and f.name not in named for cls in dataclasses_ for f in dataclasses.fields(cls))
    shown["help"] = [by_name[name] for name in ("help", "help_all")[: 2 if unnamed else 1]]
    return shown


def is_switch(action: Action) -> bool:
    """Whether an option is on or off."""
    return action.type is string_to_bool


def documented(cls: type) -> dict[str, str]:
    """Field -> what the part `Args:` of a dataclass's docstring says of it."""
    _, _, arguments = (inspect.getdoc(cls) or "").partition("\nArgs:\n")
    entry = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entry.findall(arguments.partition("\n\n")[0])}
    return {name: text.replace("None means", "by default").replace("%", "%%") for name, text in texts.items()}


def _metavar(action: Action) -> str:
    if action.metavar is not None:
        return str(action.metavar)
    if action.choices is not None:
        choices = [str(choice) for choice in action.choices]
        return f"{{{','.join(choices)}}}" if len(choices) <= MOST_CHOICES else "NAME"
    kinds: dict[Any, str] = {int: "N", float: "X"}
    last = action.dest.rpartition("_")[2]
    return kinds.get(action.type, (last if len(last) > 2 else action.dest).upper())


def _shown(action: Action) -> str:
    """The default as one would type it."""
    value = action.default.value if isinstance(action.default, Enum) else action.default
    if is_switch(action):
        return {True: "on", False: "off"}.get(value, "none")
    if value is None or value == []:
        return "none"
    return str(value).replace("%", "%%")
