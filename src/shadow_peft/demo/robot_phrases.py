"""Words and phrases of the robot commands: one table per kind, whose three columns share no entry.

``{o}`` stands for an object with its article, ``{p}`` for a place with its article. Phrases are given by split, so
the dev and test columns hold templates that training never saw.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "dev", "test"]
Column: TypeAlias = tuple[str, ...]
Table: TypeAlias = dict[Split, Column]


def words(text: str) -> Column:
    """The words of a text."""
    return tuple(text.split())


#: Things that a robot can carry. Training knows many, so that copying is learned and not a list.
THINGS: Table = {
    "train": words(
        "apple bag ball banana basket battery belt blanket book boot bottle box bracelet bread broom brush bucket button "
        "cable cake camera candle cap card carpet chain cheese clock cloth coat coin computer cookie cup cushion dish doll "
        "dress drum egg fabric feather flag flower folder fork frame game glass hammer hat jacket jar jug jam laptop leaf "
        "letter lock map marble mask milk mirror mug nail net newspaper notebook nut oil orange package paint pan paper "
        "peach pear pen pencil pepper phone pie pillow pipe plate plant potato rag remote rice ribbon ring robe rope rug "
        "ruler salad salt sandal saw scarf scissors screw shawl shell shirt shoe shovel skirt sock soup spade sponge spoon "
        "stamp stick stone string sugar suit sword tape tea ticket tie tomato tool towel toy tray trumpet umbrella vase "
        "violin wallet watch water wheel wire wood wool yarn charger screwdriver juice coffee cereal magnet stool chair "
        "bicycle helicopter robot dinosaur teddy dictionary calendar receipt invoice passport diploma sausage pizza onion "
        "garlic carrot cabbage melon cherry grape butter honey syrup vinegar mustard lipstick perfume shampoo razor "
        "toothbrush diaper crayon chalk glue tablet earring necklace goggles slipper mitten apron"
    ),
    "dev": words("bowl knife lemon glove pot guitar magazine ladder photo comb hairbrush teapot cracker sweatshirt locket"),
    "test": words(
        "kettle thermos key napkin sandwich flute backpack helmet parcel stapler sweater puzzle wrench bandage soap "
        "whistle marker purse needle envelope"
    ),
}

#: Things that open and close.
FIXTURES: Table = {
    "train": words(
        "door window fridge cupboard curtain gate drawer lid suitcase oven box bag trunk hatch bin jar safe barrel locker "
        "freezer bottle chest crate wardrobe dishwasher valve blind basket briefcase"
    ),
    "dev": ("closet", "tent", "casket", "skylight"),
    "test": ("cabinet", "mailbox", "shutter", "pantry", "toolbox"),
}

#: Things with a switch.
DEVICES: Table = {
    "train": words(
        "lamp radio fan heater computer dishwasher screen alarm printer light stove oven laptop camera phone engine pump "
        "machine motor washer dryer mixer freezer charger clock tablet stereo drill lawnmower"
    ),
    "dev": ("toaster", "speaker", "scanner", "fountain"),
    "test": ("television", "blender", "monitor", "projector", "vacuum"),
}

PLACES: Table = {
    "train": words(
        "kitchen table garage bedroom shelf desk garden sofa hallway office counter balcony bathroom porch cellar chair "
        "bench fireplace bed yard shed roof basement closet car truck boat barn store school market hospital museum church "
        "garret veranda studio gym pool court driveway mantel nightstand dresser bookcase tub stove rug mat doorway "
        "entrance bus station bakery farm tower cabin tent park"
    ),
    "dev": ("attic", "library", "stairs", "sink", "pavilion", "stable"),
    "test": ("workshop", "nursery", "terrace", "laundry", "windowsill", "lobby", "corridor"),
}

ADJECTIVES: Table = {
    "train": words(
        "red blue big small old white wooden clean black heavy long round dirty wet dry soft hard square short wide narrow "
        "thick thin plastic paper cheap expensive full hot cold warm bright dark strange fresh sharp purple pink brown "
        "silver golden orange huge pretty ugly spare tall striped folded leather glass"
    ),
    "dev": ("gray", "new", "torn", "fancy"),
    "test": ("green", "yellow", "tiny", "metal", "broken", "empty"),
}

#: Phrases of each action. The key is the label. Dev and test phrases are new arrangements of words that training has.
ACTIONS: dict[str, Table] = {
    "bring": {
        "train": (
            "bring me {o}", "bring {o} from {p}", "get me {o}", "i need {o}", "fetch {o} from {p}", "hand me {o}",
            "can you get {o} from {p}", "i want to have {o} that is in {p}", "fetch me {o}", "give me {o}",
            "i would like {o}", "go and get {o} in {p}", "pass {o} to me", "bring {o} to me", "may i have {o}",
        ),
        "dev": ("could i have {o}", "i would like to have {o} from {p}", "go and bring me {o}"),
        "test": ("can i have {o}", "go and fetch {o} out of {p}", "can you bring {o} over here", "pass me {o}"),
    },
    "put": {
        "train": (
            "put {o} on {p}", "place {o} in {p}", "leave {o} on {p}", "set {o} down on {p}", "put {o} into {p}",
            "move {o} to {p}", "carry {o} to {p}", "{o} belongs in {p}", "take {o} to {p}", "store {o} at {p}",
            "i want {o} to be on {p}", "{o} should be placed on {p}", "{o} has to go to {p}", "lay {o} down at {p}",
        ),
        "dev": ("set {o} on {p}", "carry {o} over to {p}", "{o} should be moved to {p}"),
        "test": ("{o} has to be on {p}", "i want {o} placed on {p}", "store {o} in {p}", "lay {o} on {p}"),
    },
    "clean": {
        "train": (
            "clean {o}", "wash {o} in {p}", "wipe {o}", "clean {o} in {p}", "{o} is dirty", "wipe {o} down",
            "make {o} clean again", "{o} in {p} needs cleaning", "polish {o} in {p}", "{o} must be washed",
            "{o} needs a wash", "there is dirt on {o}", "i want {o} cleaned", "scrub {o}", "get the dirt off {o}",
        ),
        "dev": ("scrub {o} in {p}", "i want {o} washed", "{o} in {p} is so dirty"),
        "test": ("{o} has to be cleaned", "give {o} a wash", "there is dirt on {o} in {p}", "polish {o}"),
    },
    "find": {
        "train": (
            "find {o}", "look for {o} in {p}", "where is {o}", "i lost {o} in {p}", "search for {o}", "{o} is lost",
            "find {o} in {p}", "i can not find {o}", "have you seen {o}", "{o} is missing from {p}", "where did you see {o}",
            "tell me where {o} is", "do you know where to find {o}", "search {p} and find {o}",
        ),
        "dev": ("help me find {o}", "{o} is lost in {p}", "look where {o} is"),
        "test": ("do you know where {o} is", "search {p} for {o}", "{o} is missing", "where did i lose {o}"),
    },
    "open": {
        "train": (
            "open {o}", "open {o} in {p}", "can you open {o}", "{o} should be open", "open up {o} in {p}",
            "pull {o} open", "unlock {o}", "{o} has to be opened", "get {o} of {p} open", "keep {o} open",
            "{o} must be open",
        ),
        "dev": ("get {o} open", "i want {o} in {p} open"),
        "test": ("{o} must be opened", "would you open {o} of {p}", "leave {o} open"),
    },
    "close": {
        "train": (
            "close {o}", "close {o} in {p}", "shut {o}", "{o} should be closed", "can you shut {o} in {p}",
            "push {o} shut", "lock {o}", "{o} has to be shut", "get {o} of {p} closed", "keep {o} closed",
            "{o} must be shut",
        ),
        "dev": ("get {o} closed", "i want {o} in {p} shut"),
        "test": ("{o} must be closed", "would you shut {o} of {p}", "leave {o} closed"),
    },
    "switch_on": {
        "train": (
            "switch on {o}", "turn on {o} in {p}", "turn {o} on", "start {o}", "{o} should be on", "power on {o}",
            "switch {o} in {p} on", "{o} has to be switched on", "get {o} of {p} turned on", "keep {o} on",
            "{o} must be started",
        ),
        "dev": ("get {o} switched on", "i want {o} in {p} turned on"),
        "test": ("{o} must be turned on", "would you start {o} of {p}", "leave {o} switched on"),
    },
    "switch_off": {
        "train": (
            "switch off {o}", "turn off {o} in {p}", "turn {o} off", "stop {o}", "{o} should be off", "power off {o}",
            "switch {o} in {p} off", "{o} has to be switched off", "get {o} of {p} turned off", "keep {o} off",
            "{o} must be stopped",
        ),
        "dev": ("get {o} switched off", "i want {o} in {p} turned off"),
        "test": ("{o} must be turned off", "would you stop {o} of {p}", "leave {o} switched off"),
    },
    "go": {
        "train": (
            "go to {p}", "drive to {p}", "move over to {p}", "come to {p}", "walk to {p}", "meet me in {p}",
            "go and see {p}", "you should drive over to {p}", "come and meet me at {p}",
            "find your way to {p}", "come with me to {p}",
        ),
        "dev": ("walk over to {p}", "you should come to {p}"),
        "test": ("make your way to {p}", "you should go to {p}", "come and see me in {p}"),
    },
    "wait": {
        "train": (
            "wait", "stop right there", "stay where you are", "do not move", "hold on", "wait for me", "stay here",
            "you have to stop", "just wait", "stop and wait", "you must not move", "stand still",
        ),
        "dev": ("stay right there", "wait a little"),
        "test": ("just stay there", "stop moving", "you have to wait"),
    },
}  # fmt: skip

#: Phrases of each manner. The key is the label; without a phrase it is null.
MANNERS: dict[str, Table] = {
    "slowly": {
        "train": (
            "slowly", "very slowly", "without hurry", "take your time", "there is time", "no need to hurry", "slow and easy",
        ),
        "dev": ("please do it slowly",),
        "test": ("nice and slowly", "there is no hurry"),
    },
    "quickly": {
        "train": (
            "quickly", "right now", "as fast as you can", "hurry up", "very quickly", "be quick", "as soon as possible",
        ),
        "dev": ("please do it quickly",),
        "test": ("really quickly", "as quickly as possible"),
    },
    "carefully": {
        "train": ("carefully", "very gently", "with care", "be careful", "very carefully", "be gentle", "take care"),
        "dev": ("please do it carefully",),
        "test": ("please be very careful", "as gently as you can"),
    },
    "quietly": {
        "train": (
            "quietly", "without any noise", "be quiet", "the baby is asleep", "very quietly", "make no noise", "in silence",
        ),
        "dev": ("please do it quietly",),
        "test": ("as quietly as you can", "do not make noise"),
    },
}  # fmt: skip

OPENERS: Table = {
    "train": ("please", "hey robot", "robot", "could you please", "ok", "now", "listen", "i think you should"),
    "dev": ("hello", "would you please"),
    "test": ("excuse me robot", "so", "if you can", "hi there"),
}

CLOSERS: Table = {
    "train": ("please", "thanks", "thank you", "for me", "ok"),
    "dev": ("if possible",),
    "test": ("thanks a lot", "my friend"),
}

#: Sentences that mention other objects and places and ask for nothing.
DISTRACTORS: Table = {
    "train": (
        "i already have {o}", "the weather is nice", "not {o}", "my sister likes {o}", "i was in {p} before",
        "we bought {o} yesterday", "{o} can stay in {p}", "it is late", "do not touch {o}",
    ),
    "dev": ("{o} is fine", "i am tired", "my brother is in {p}"),
    "test": ("forget about {o}", "{o} is not important", "i was reading in {p}", "my guests will be here soon"),
}  # fmt: skip

#: The objects of an action; None for actions without an object.
ACTS_ON: dict[str, Table | None] = {
    "bring": THINGS, "put": THINGS, "clean": THINGS, "find": THINGS, "open": FIXTURES, "close": FIXTURES,
    "switch_on": DEVICES, "switch_off": DEVICES, "go": None, "wait": None,
}  # fmt: skip
