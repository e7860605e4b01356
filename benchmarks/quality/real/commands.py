"""Commands to a home -> intent and slots as one line of JSON: the English grammar of Home Assistant (Apache-2.0).

Templates and intents come from the PyPI package `home-assistant-intents`; what a user would name (rooms, devices, lists,
people, messages) is ours. Templates are dealt to train, dev and test inside each intent, and so are the names. An intent of
fewer than three templates is in train alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

from benchmarks.quality.real.grammar import Drawing
from benchmarks.quality.real.packages import INTENTS, fetched
from benchmarks.quality.tasks import Example, Splits

SPLITS = ("train", "dev", "test")
AREAS = (
    "kitchen|bedroom|bathroom|garage|hallway|office|attic|basement|nursery|pantry|laundry room|living room|dining room|"
    "guest room|study|library|workshop|balcony|patio|garden|porch|terrace|sunroom|playroom|gym|cellar|foyer|den|lounge|"
    "master bedroom|utility room|music room|boot room|greenhouse|barn|shed|loft|conservatory|game room|wine cellar"
)
FLOORS = "ground|first|second|third|upper|lower|top|main|bottom|middle|fourth|fifth"
PLACES = (
    "desk|bedside|ceiling|corner|window|stairs|reading|tv|sofa|mirror|island|driveway|backyard|front|rear|side|guest|kids|"
    "sarah's|tom's|fireplace|bookshelf|closet|entrance|pool|gate|east|west|north|south|counter|piano|cabinet|tall|small|big|"
    "blue|old|new|spare"
)
DEVICES = {
    "light": "lamp|light|spotlight|led strip", "switch": "socket|plug|heater|coffee maker", "fan": "fan|ventilator",
    "cover": "blinds|shutter|curtain|awning", "lock": "lock|door lock|padlock", "valve": "valve|sprinkler|tap",
    "climate": "thermostat|radiator|air conditioner", "media_player": "speaker|television|radio|soundbar",
    "sensor": "sensor|meter|probe", "binary_sensor": "detector|contact sensor", "lawn_mower": "mower|lawn robot",
    "vacuum": "vacuum|cleaning robot", "button": "doorbell|button", "input_button": "button",
    "input_boolean": "toggle|guest mode", "todo": "shopping|to-do|packing|project", "weather": "weather station|forecast",
    "scene": "evening|party|dinner|movie", "script": "routine|wake-up|cleanup",
}  # fmt: skip
PEOPLE = "Anna|Ben|Carla|David|Elena|Felix|Greta|Hugo|Ines|Jonas|Karin|Leo|Marta|Nils|Olga|Paul|Rosa|Simon|Tara|Viktor"
ITEMS = (
    "milk|eggs|bread|butter|apples|rice|coffee beans|dish soap|batteries|light bulbs|cat food|paper towels|olive oil|cheese|"
    "call the plumber|water the plants|book the dentist|pay the rent|wash the car|return the parcel|fix the fence|"
    "buy stamps|tomatoes|yoghurt|honey|flour|garlic|toothpaste|shampoo|candles|screws|pasta"
)
MESSAGES = (
    "dinner is ready|we are leaving in ten minutes|please come downstairs|the bus is here|time for bed|lunch is served|"
    "somebody is at the door|the cake is done|grandma has arrived|bring your coats|the movie is starting|school is out|"
    "the laundry is finished|feed the dog|be quiet please|the pizza is coming"
)
SONGS = (
    "bohemian rhapsody|abbey road|miles davis|the four seasons|morning jazz|kind of blue|nina simone|purple rain|road trip|"
    "rumours|radiohead|clair de lune|sunday brunch|thriller|johnny cash|deep focus|hotel california|daft punk|bolero"
)
TIMERS = "pizza|egg|pasta|laundry|tea|homework|bread|nap|cookie|rice|workout|potato|oven|break|meeting|chicken"
LATER = (
    "turn off the heater|open the window|start the washing machine|lock the door|play some music|stop the sprinkler|"
    "dim the lights|close the shutters|turn on the fan|feed the fish|ring the bell|switch off the oven"
)
ZONES = "home|work|school|the gym|the office|the park|the airport|grandma's house|the station|the library|town|the club"
POOLS = {
    "area": AREAS.split("|"), "floor": FLOORS.split("|"), "message": MESSAGES.split("|"), "search_query": SONGS.split("|"),
    "timer_name": TIMERS.split("|"), "timer_command": LATER.split("|"), "zone": ZONES.split("|"),
    "shopping_list_item": ITEMS.split("|"), "todo_list_item": ITEMS.split("|"),
}  # fmt: skip

Template: TypeAlias = tuple[str, str, dict[str, Any]]
"""Intent, sentence template, and the data block that it stands in."""


def dealt(things: list[Any], name: str) -> dict[str, list[Any]]:
    """Things of each split: a fifth, but at least one, to dev and as many to test; fewer than three all to train."""
    things = list(things)
    Random(f"dealt/{name}").shuffle(things)
    share = max(1, len(things) // 5) if len(things) >= 3 else 0
    return {"dev": things[:share], "test": things[share : 2 * share], "train": things[2 * share :]}


@dataclass(frozen=True)
class Home:
    """What the slots of one data block may hold, in one split."""

    split: str
    lists: dict[str, Any]
    domains: tuple[str, ...]

    def draw(self, source: str, random: Random) -> tuple[str, Any]:
        """A value of a list: as it is spoken, a template itself, and as it is meant."""
        if source == "name":
            name = self._name(random)
            return name, name
        if source in POOLS:
            value = random.choice(dealt(POOLS[source], source)[self.split])
            return value, value
        known = self.lists[source]
        if "values" in known:
            chosen = random.choice(known["values"])
            return chosen["in"], chosen["out"]
        span = known["range"]
        number = random.randrange(span["from"], span["to"] + 1, span.get("step", 1))
        return str(number), number * span.get("multiplier", 1)

    def _name(self, random: Random) -> str:
        domain = random.choice(self.domains or ("light",))
        if domain == "person":
            return str(random.choice(dealt(PEOPLE.split("|"), "person")[self.split]))
        place = random.choice(dealt(PLACES.split("|"), "place")[self.split])
        return f"{place} {random.choice(DEVICES[domain].split('|'))}"


def templates(grammar: dict[str, Any], split: str) -> dict[str, list[Template]]:
    """The templates of each intent in a split."""
    found: dict[str, list[Template]] = defaultdict(list)
    for intent, content in grammar["intents"].items():
        every = [(intent, sentence, block) for block in content["data"] for sentence in block["sentences"]]
        for template in dealt(every, intent)[split]:
            found[intent].append(template)
    return found


def commands(split: str) -> Iterator[Example]:
    """Commands without end; an intent is drawn by the square root of the number of its templates."""
    path = fetched(INTENTS) / "home_assistant_intents/data/en.json"
    grammar, random = json.loads(path.read_text(encoding="utf-8")), Random(f"commands/{split}")
    by_intent = templates(grammar, split)
    weights = [len(found) ** 0.5 for found in by_intent.values()]
    while True:
        (pool,) = random.choices(list(by_intent.values()), weights)
        intent, sentence, block = random.choice(pool)
        domains = block.get("requires_context", {}).get("domain", ())
        home = Home(split, grammar["lists"], tuple(domains))
        text, slots = Drawing(grammar["expansion_rules"], home, random).sentence(sentence)
        meaning = {"intent": intent, **dict(sorted({**block.get("slots", {}), **slots}.items()))}
        yield {"prompt": f"{text}\n", "completion": json.dumps(meaning, ensure_ascii=False)}


def commands_task(sizes: dict[str, int]) -> Splits:
    """As many different commands as asked for; none of dev or test is one of train."""
    splits: Splits = {}
    seen: set[str] = set()
    for split in SPLITS:
        splits[split] = []
        for example in commands(split):
            if example["prompt"] not in seen:
                seen.add(example["prompt"])
                splits[split].append(example)
            if len(splits[split]) == sizes[split]:
                break
    return splits
