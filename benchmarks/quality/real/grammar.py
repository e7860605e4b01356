"""Sentence templates of Home Assistant: parsed, and sentences drawn from them with the values of their slots.

[a]  optional     (a|b)  one of     (a;b)  in any order     <rule>  a named template     {list:slot}  a slot's value
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, TypeAlias

Slots: TypeAlias = dict[str, Any]
TOKEN = re.compile(r"\{[^}]*\}|<[^>]*>|[\[\]()|;]|[^\[\](){}<>|;]+")
CLOSING = {"[": "]", "(": ")"}


@dataclass(frozen=True)
class Text:
    """Words as they are."""

    text: str


@dataclass(frozen=True)
class Rule:
    """A template that has a name."""

    name: str


@dataclass(frozen=True)
class Value:
    """A slot, and the list that its values come from."""

    source: str
    slot: str


@dataclass(frozen=True)
class Group:
    """Parts "in sequence", "one of" which, or all "in any order"; an optional group may also be empty."""

    kind: str
    parts: tuple[Node, ...]
    optional: bool = False


Node: TypeAlias = Text | Rule | Value | Group


class Values(Protocol):
    """Where the values of slots come from."""

    def draw(self, source: str, random: Random) -> tuple[str, Any]:
        """A value of a list: as it is spoken, a template itself, and as it is meant."""


def parse(template: str) -> Group:
    """The tree of a template.

    Raises:
        ValueError: its brackets do not match.
    """
    tokens = TOKEN.findall(template)
    group, rest = _group(tokens, "")
    if rest:
        raise ValueError(f"Unmatched brackets in the template {template!r}.")
    return group


def _group(tokens: list[str], closing: str) -> tuple[Group, list[str]]:
    """The group up to its closing bracket, and the tokens behind that."""
    branches: list[list[Node]] = [[]]
    kind = "in sequence"
    while tokens and tokens[0] != closing:
        token, tokens = tokens[0], tokens[1:]
        if token in CLOSING:
            inner, tokens = _group(tokens, CLOSING[token])
            branches[-1].append(Group(inner.kind, inner.parts, token == "["))
        elif token in "|;":
            kind = "one of" if token == "|" else "in any order"
            branches.append([])
        elif token in ")]":
            raise ValueError(f"Unexpected {token!r} in a template.")
        else:
            branches[-1].append(_leaf(token))
    if closing and not tokens:
        raise ValueError(f"A template lacks {closing!r}.")
    parts = tuple(branches[0]) if kind == "in sequence" else tuple(Group("in sequence", tuple(b)) for b in branches)
    return Group(kind, parts), tokens[1:]


def _leaf(token: str) -> Node:
    if token[0] == "<":
        return Rule(token[1:-1])
    if token[0] == "{":
        source, _, slot = token[1:-1].partition(":")
        return Value(source, slot or source)
    return Text(token)


@dataclass(frozen=True)
class Drawing:
    """Draws sentences: the named templates, where values come from, and the source of chance."""

    rules: Mapping[str, str]
    values: Values
    random: Random

    def sentence(self, template: str) -> tuple[str, Slots]:
        """A sentence of a template, spaces tidied, and the values of its slots in the order in which they were drawn."""
        slots: Slots = {}
        text = self._text(parse(template), slots)
        return " ".join(text.split()), slots

    def _text(self, node: Node, slots: Slots) -> str:
        if isinstance(node, Text):
            return node.text
        if isinstance(node, Rule):
            return self._text(parse(self.rules[node.name]), slots)
        if isinstance(node, Value):
            spoken, slots[node.slot] = self.values.draw(node.source, self.random)
            return self._text(parse(spoken), slots)
        if node.optional and self.random.random() < 0.5:
            return ""
        if node.kind == "one of":
            return self._text(self.random.choice(node.parts), slots)
        parts = list(node.parts)
        if node.kind == "in any order":
            self.random.shuffle(parts)
        return (" " if node.kind == "in any order" else "").join(self._text(part, slots) for part in parts)
