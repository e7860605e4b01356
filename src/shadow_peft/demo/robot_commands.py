"""The embedded task: a spoken-style robot command in, one line of JSON out.

    text: hey robot, fetch the red cup from the kitchen, take your time keys: action, object, place, manner
    {"action": "bring", "object": "red cup", "place": "kitchen", "manner": "slowly"}

``action`` and ``manner`` are labels with many phrasings. ``object`` and ``place`` are copied from the sentence. Fields that
the sentence does not mention are ``null``. The three splits share no phrase, object, place, adjective or distractor, so dev
and test measure generalisation to commands that training never saw. Typing errors occur in the words of the phrases, never
in the words to be copied. The seed determines everything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from shadow_peft.demo.robot_phrases import (
    ACTIONS,
    ACTS_ON,
    ADJECTIVES,
    CLOSERS,
    DISTRACTORS,
    MANNERS,
    OPENERS,
    PLACES,
    THINGS,
    Split,
    Table,
)

#: How often a sentence of a split has a typing error, and a distractor.
SLIP_RATE: dict[Split, float] = {"train": 0.15, "dev": 0.25, "test": 0.25}
DISTRACTOR_RATE: dict[Split, float] = {"train": 0.3, "dev": 0.4, "test": 0.4}
KEYS = ("action", "object", "place", "manner")
ARTICLES = ("the", "my", "the", "our", "that", "the")


@dataclass(frozen=True)
class Command:
    """One command and its meaning; ``None`` where the sentence does not mention it."""

    sentence: str
    action: str
    object: str | None
    place: str | None
    manner: str | None

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return f"text: {self.sentence} keys: {', '.join(KEYS)}\n"

    @property
    def completion(self) -> str:
        """What the model should write: one line of JSON."""
        return json.dumps({key: getattr(self, key) for key in KEYS})

    def row(self) -> dict[str, str]:
        """The command as a line of training data."""
        return {"prompt": self.prompt, "completion": self.completion}


def commands(split: Split, count: int, seed: int = 0) -> list[Command]:
    """``count`` distinct commands of a split.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.
        count: number of commands.
        seed: the same seed gives the same commands in the same order.

    Raises:
        ValueError: ``count`` is negative or above 200,000.
    """
    if not 0 <= count <= 200_000:
        raise ValueError(f"count must lie between 0 and 200000, got {count}")
    rng = Random(f"{split}/{seed}")
    found: dict[str, Command] = {}
    while len(found) < count:
        command = one_command(rng, split)
        found.setdefault(command.sentence, command)
    return list(found.values())


def one_command(rng: Random, split: Split) -> Command:
    """Draw one command: a phrase of an action with its slots filled, additions around it, and sometimes a typing error."""
    action = rng.choice(list(ACTIONS))
    phrase = slip(rng, rng.choice(ACTIONS[action][split]), SLIP_RATE[split])
    thing, place = noun(rng, ACTS_ON[action], split), rng.choice(PLACES[split])
    manner = rng.choice([None, *MANNERS])
    sentence = dress(rng, split, fill(rng, phrase, thing, place), manner)
    return Command(sentence, action, thing, place if "{p}" in phrase else None, manner)


def noun(rng: Random, table: Table | None, split: Split) -> str | None:
    """An object, with an adjective half of the time."""
    if table is None:
        return None
    name = rng.choice(table[split])
    return f"{rng.choice(ADJECTIVES[split])} {name}" if rng.random() < 0.5 else name


def fill(rng: Random, phrase: str, thing: str | None, place: str) -> str:
    """Fill object and place, each with an article, into a phrase."""
    return phrase.replace("{o}", f"{rng.choice(ARTICLES)} {thing}").replace("{p}", f"the {place}")


def dress(rng: Random, split: Split, core: str, manner: str | None) -> str:
    """Add opener, manner, closer and distractor around the core of a sentence."""
    parts = [core]
    if manner:
        parts.insert(rng.choice([0, 1, 1]), slip(rng, rng.choice(MANNERS[manner][split]), SLIP_RATE[split] / 2))
    if rng.random() < 0.4:
        parts.insert(0, rng.choice(OPENERS[split]))
    if rng.random() < 0.25:
        parts.append(rng.choice(CLOSERS[split]))
    if rng.random() < DISTRACTOR_RATE[split]:
        parts.insert(rng.choice([0, len(parts)]), distractor(rng, split))
    return ", ".join(parts)


def distractor(rng: Random, split: Split) -> str:
    """A remark about another object or place."""
    thing = noun(rng, THINGS, split)
    return fill(rng, rng.choice(DISTRACTORS[split]), thing, rng.choice(PLACES[split]))


def slip(rng: Random, phrase: str, rate: float) -> str:
    """With probability ``rate``, drop, double or swap a letter of one word that is no slot."""
    words = phrase.split(" ")
    spots = [i for i, word in enumerate(words) if len(word) > 3 and "{" not in word]
    if not spots or rng.random() >= rate:
        return phrase
    spot = rng.choice(spots)
    words[spot] = misspelled(rng, words[spot])
    return " ".join(words)


def misspelled(rng: Random, word: str) -> str:
    """The word with one typing error after its first letter; the result may equal the word."""
    i = rng.randrange(1, len(word) - 1)
    slips = (word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    return rng.choice(slips)
