"""Invented short documents for the embedded base of ``shadow-peft demo``, deterministic by seed.

Plain stories, JSON records next to the sentence they restate, lists, copying and spelling drills. None of them uses the
robot-command task of the demo: no imperative sentence, none of its templates, none of its labels or keys.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable

Rng = random.Random


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


NAMES = words(
    "Anna Ben Clara David Elena Farid Grace Hugo Ines Jonas Kira Liam Maria Noah Olga Pavel Quinn Rosa Samir "
    "Tara Umar Vera Walter Yuki Zoe Emma Oscar Lucy Peter Sofia Tom Nina Carl Alice Bob Marta Ivan Leo Mia Sam"
)
THINGS = words(
    "apple bag ball banana basket battery bell belt blanket boat book boot bottle bowl box bracelet bread bridge "
    "broom brush bucket button cable cake camera candle cap card carpet chain chair cheese clock cloth coat coin "
    "comb computer cookie cup curtain cushion desk dish doll door dress drum egg engine envelope fan feather fence "
    "flag flower flute folder fork frame game glass glove guitar hammer hat helmet jacket jar jug kettle key knife "
    "ladder lamp laptop leaf lemon letter lid lock magazine map marble mask mirror mug nail napkin needle net "
    "newspaper notebook nut orange package paint pan paper parcel peach pear pen pencil phone photo piano picture "
    "pillow pipe plate pot potato purse puzzle radio rag ribbon ring robe rope ruler saddle salt sandal saw scarf "
    "scissors screen screw shawl shell shirt shoe shovel skirt soap sock sofa spade sponge spoon stamp stone stool "
    "string sugar suitcase sweater table tape tea telephone tent ticket tie tomato tool towel toy tray trumpet "
    "umbrella vase violin wallet watch wheel whistle wire wrench yarn remote charger tablet thermos backpack "
    "screwdriver pliers bandage medicine juice coffee milk cereal salad soup sandwich blender toaster plant bulb "
    "magnet marker stapler eraser calculator headphones keyboard mouse monitor speaker printer cord plug"
)
PLACES = words(
    "kitchen garden garage cellar attic bedroom bathroom hall office library school market station harbor church "
    "museum park forest river lake mountain village bakery pharmacy hospital theater workshop barn tower castle "
    "balcony porch stairs corridor basement laundry pantry shelf cupboard drawer closet cabinet counter bench "
    "windowsill fridge oven sink hallway nursery studio terrace lobby warehouse playground classroom cafeteria"
)
ADJECTIVES = words(
    "red blue green yellow black white brown gray purple pink silver golden big small large tiny heavy light old new "
    "clean dirty wet dry soft hard round square long short wide narrow thick thin wooden plastic metal paper cheap "
    "expensive empty full broken hot cold warm cool bright dark quiet loud strange common simple rare fresh sharp"
)
VERBS = words(
    "found lost bought sold saw painted repaired carried moved cleaned opened closed watched took gave kept lifted "
    "dropped washed built hid showed used borrowed counted touched needed wanted forgot remembered picked broke "
    "filled placed left brought pushed pulled turned held fetched grabbed delivered checked switched wiped stored"
)
ADVERBS = words(
    "slowly quickly carefully quietly gently suddenly happily sadly calmly politely softly firmly nearly often "
    "rarely always never sometimes today yesterday again alone together immediately finally soon later patiently"
)
PREPS = words("in on under near behind beside above inside from to into onto below between around next_to")
JOBS = words("baker teacher nurse farmer pilot doctor driver painter sailor cook tailor writer clerk guard singer")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
FILLERS = ("Well, ", "You know, ", "I think ", "Yesterday ", "It seems that ", "As far as I know, ", "By the way, ")
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def common_words(texts: list[str], count: int) -> list[str]:
    """The ``count`` most frequent lower-case words of 3 to 12 letters."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(re.findall(r"\b[a-z]{3,12}\b", text))
    return sorted(word for word, _ in found.most_common(count))


def made_up(rng: Rng) -> str:
    """A pronounceable word that means nothing, so that it can only be copied."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) + rng.choice(["", "n", "r", "s", "t"])


def misspell(rng: Rng, word: str) -> str:
    """One slip of the fingers: a letter dropped, doubled, swapped or replaced."""
    if len(word) < 3:
        return word
    i = rng.randrange(len(word) - 1)
    slip = rng.randrange(4)
    if slip == 0:
        return word[:i] + word[i + 1 :]
    if slip == 1:
        return word[:i] + word[i] + word[i:]
    if slip == 2:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + rng.choice(string.ascii_lowercase) + word[i + 1 :]


class Writer:
    """Writes one invented document after another from a seeded stream."""

    def __init__(self, rng: Rng, known: list[str]) -> None:
        self.rng = rng
        self.words = known

    def word(self) -> str:
        """Any word, mostly a real one."""
        kind = self.rng.random()
        if kind < 0.45:
            return self.rng.choice(THINGS)
        return self.rng.choice(self.words) if kind < 0.8 else made_up(self.rng)

    def thing(self) -> str:
        """A thing with, half of the time, an adjective or two."""
        adjectives = self.rng.sample(ADJECTIVES, self.rng.choice([0, 0, 1, 1, 1, 2]))
        return " ".join([*adjectives, self.word()])

    def place(self) -> str:
        """A place, sometimes of an unknown name."""
        return self.rng.choice(PLACES) if self.rng.random() < 0.8 else self.word()

    def name(self) -> str:
        """A person's name, sometimes an invented one."""
        return self.rng.choice(NAMES) if self.rng.random() < 0.8 else made_up(self.rng).title()

    def sentence(self) -> str:
        """One plain statement."""
        rng = self.rng
        prep = rng.choice(PREPS).replace("_", " ")
        forms = (
            f"{self.name()} {rng.choice(VERBS)} the {self.thing()} {prep} the {self.place()}.",
            f"The {self.thing()} was {prep} the {self.place()}, and {self.name()} {rng.choice(VERBS)} it.",
            f"{rng.choice(ADVERBS).title()}, {self.name()} {rng.choice(VERBS)} a {self.thing()}.",
            f"There was a {self.thing()} {prep} the {self.place()}.",
            f"{self.name()} {rng.choice(ADVERBS)} {rng.choice(VERBS)} the {self.thing()} and the {self.thing()}.",
            f"Was the {self.thing()} {rng.choice(ADJECTIVES)}? No, it was {rng.choice(ADJECTIVES)}.",
        )
        return rng.choice(forms)

    def story(self) -> str:
        """A handful of statements about the same people."""
        return " ".join(self.sentence() for _ in range(self.rng.randint(3, 7)))

    def record(self) -> tuple[str, dict[str, str | int | None]]:
        """A statement and the same facts as keys and values."""
        rng = self.rng
        who, item, where, other = self.name(), self.thing(), self.place(), self.name()
        prep, count, day = rng.choice(PREPS).replace("_", " "), rng.randint(1, 99), rng.choice(DAYS)
        how, job = rng.choice(ADVERBS), rng.choice(JOBS)
        forms: tuple[tuple[str, dict[str, str | int | None]], ...] = (
            (f"{who} bought a {item} at the {where}", {"buyer": who, "article": item, "shop": where}),
            (f"the {item} of {who} lies {prep} the {where}", {"owner": who, "thing": item, "position": where, "side": prep}),
            (f"{who} met {other} near the {where} on {day}", {"first": who, "second": other, "spot": where, "day": day}),
            (f"{who} is a {job} and owns {count} {item}s", {"person": who, "job": job, "count": count, "goods": item}),
            (f"on {day} {who} {how} repaired the {item}", {"day": day, "worker": who, "style": how, "part": item}),
            (f"a {item} and a {self.word()} were seen {prep} the {where}", {"seen": item, "spot": where, "side": prep}),
            (f"{who} gave {other} {count} {item}s", {"giver": who, "taker": other, "count": count, "gift": item}),
            (f"the {where} has a {item}, which {who} {how} uses", {"site": where, "tool": item, "user": who, "style": how}),
        )
        return rng.choice(forms)

    def noisy(self, text: str) -> str:
        """The same statement as people type it: a filler, a slip, no capital."""
        if self.rng.random() < 0.3:
            text = self.rng.choice(FILLERS) + text
        if self.rng.random() < 0.25:
            parts = text.split(" ")
            slot = self.rng.randrange(len(parts))
            parts[slot] = misspell(self.rng, parts[slot])
            text = " ".join(parts)
        return text + self.rng.choice([".", "", ".", "!"])

    def restated(self) -> str:
        """A few statements, each followed by its record; keys are asked for by name."""
        frame = self.rng.choice(("{s}\n{k}: {j}", "text: {s} keys: {k}\n{j}", "{s} | {k} | {j}", "# {k}\n{s}\n{j}"))
        return "\n".join(self.one_restated(frame) for _ in range(self.rng.randint(1, 4)))

    def one_restated(self, frame: str) -> str:
        """One statement and its record in a frame."""
        sentence, facts = self.record()
        keys = list(facts)
        if self.rng.random() < 0.5:
            self.rng.shuffle(keys)
        keys = keys[: self.rng.randint(1, len(keys))]
        if self.rng.random() < 0.25:
            keys.append(self.rng.choice(["color", "price", "weight", "note"]))
        answer = json.dumps({key: facts.get(key) for key in keys})
        return frame.format(s=self.noisy(sentence), k=", ".join(keys), j=answer)

    def tree(self, depth: int) -> object:
        """A random JSON value."""
        kind = self.rng.random()
        if depth and kind < 0.45:
            return {self.rng.choice(self.words): self.tree(depth - 1) for _ in range(self.rng.randint(1, 4))}
        if depth and kind < 0.55:
            return [self.tree(depth - 1) for _ in range(self.rng.randint(1, 4))]
        leaves: tuple[object, ...] = (self.thing(), self.word(), self.rng.randint(0, 500), None, True, False)
        return self.rng.choice(leaves)

    def json_document(self) -> str:
        """A nested JSON document on one line or indented."""
        value = {self.rng.choice(self.words): self.tree(2) for _ in range(self.rng.randint(2, 4))}
        return json.dumps(value, indent=self.rng.choice([None, None, 2]))

    def copying(self) -> str:
        """Repeat, pick or count words of a list."""
        parts = [self.word() for _ in range(self.rng.randint(3, 7))]
        slot = self.rng.randrange(len(parts))
        line = " ".join(parts)
        forms = (
            f"say: {line}\nagain: {line}",
            f"words: {line}\nnumber {slot + 1}: {parts[slot]}",
            f"{line}\nlast: {parts[-1]}\nfirst: {parts[0]}",
            f"{line}\njson: {json.dumps(parts)}",
            f"after {parts[slot - 1]} in {line}: {parts[slot]}" if slot else f"{line} begins with {parts[0]}",
        )
        return self.rng.choice(forms)

    def spelling(self) -> str:
        """Slips beside the words that were meant."""
        parts = [self.rng.choice(THINGS + PLACES + ADJECTIVES + self.words) for _ in range(4)]
        return "\n".join(f"{misspell(self.rng, w)} -> {w}" for w in parts)

    def pairs(self) -> str:
        """Two named things, then a question about one of them."""
        names = self.rng.sample(NAMES, 3)
        things = [self.thing() for _ in names]
        asked = self.rng.randrange(3)
        facts = ". ".join(f"{n} has the {t}" for n, t in zip(names, things, strict=True))
        return f"{facts}. What does {names[asked]} have? The {things[asked]}."

    def document(self) -> str:
        """One invented document of any kind."""
        kinds: list[Callable[[], str]] = [
            self.story, self.restated, self.json_document, self.copying, self.spelling, self.pairs,
        ]  # fmt: skip
        return self.rng.choices(kinds, weights=[3, 7, 1, 3, 1, 2])[0]()


def invented(rng: Rng, known: list[str], characters: int) -> list[str]:
    """Invented documents of ``characters`` characters in total, with words out of ``known`` among others."""
    writer, documents, size = Writer(rng, known), [], 0
    while size < characters:
        documents.append(writer.document())
        size += len(documents[-1])
    return documents
