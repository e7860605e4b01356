"""The generator of the demo's task: deterministic, valid, and with splits that share nothing."""

from __future__ import annotations

import json

import pytest

from shadow_peft.demo import robot_phrases as phrases
from shadow_peft.demo.robot_commands import ARTICLES, Command, commands

SPLITS: tuple[phrases.Split, ...] = ("train", "dev", "test")
FLAT_TABLES = ("THINGS", "FIXTURES", "DEVICES", "PLACES", "ADJECTIVES", "OPENERS", "CLOSERS", "DISTRACTORS")


def entries(split: phrases.Split) -> dict[str, set[str]]:
    """Everything that a split can say, by kind."""
    flat = {name: set(getattr(phrases, name)[split]) for name in FLAT_TABLES}
    actions = {phrase for table in phrases.ACTIONS.values() for phrase in table[split]}
    manners = {phrase for table in phrases.MANNERS.values() for phrase in table[split]}
    return {**flat, "ACTIONS": actions, "MANNERS": manners}


@pytest.mark.parametrize(("one", "other"), [("train", "dev"), ("train", "test"), ("dev", "test")])
def test_splits_share_no_phrase_object_or_place(one: phrases.Split, other: phrases.Split) -> None:
    first, second = entries(one), entries(other)
    assert {kind: first[kind] & second[kind] for kind in first} == {kind: set() for kind in first}


@pytest.mark.parametrize("split", SPLITS)
def test_no_phrase_means_two_things(split: phrases.Split) -> None:
    for tables in (phrases.ACTIONS, phrases.MANNERS):
        said = [phrase for table in tables.values() for phrase in table[split]]
        assert len(said) == len(set(said))


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_commands(split: phrases.Split) -> None:
    assert commands(split, 200, seed=3) == commands(split, 200, seed=3)
    assert commands(split, 200, seed=3) != commands(split, 200, seed=4)
    assert commands(split, 200, seed=3)[:50] == commands(split, 50, seed=3)


def test_thousands_of_distinct_sentences() -> None:
    assert len({command.sentence for command in commands("train", 20_000)}) == 20_000
    assert len({command.sentence for command in commands("test", 5_000)}) == 5_000


@pytest.mark.parametrize("split", SPLITS)
def test_completion_is_one_line_of_json_that_states_the_command(split: phrases.Split) -> None:
    for command in commands(split, 500):
        meaning = json.loads(command.completion)
        assert list(meaning) == ["action", "object", "place", "manner"]
        assert meaning == {name: getattr(command, name) for name in meaning}
        assert "\n" not in command.completion
        assert command.completion.startswith("{")


@pytest.mark.parametrize("split", SPLITS)
def test_object_and_place_can_be_copied_from_the_sentence(split: phrases.Split) -> None:
    for command in commands(split, 500):
        assert all(value in command.sentence for value in (command.object, command.place) if value)


def test_test_sentences_never_occur_in_training() -> None:
    assert not {c.sentence for c in commands("train", 20_000)} & {c.sentence for c in commands("test", 2_000)}


def test_test_split_has_distractors() -> None:
    openings = [phrase.split("{")[0].strip() for phrase in phrases.DISTRACTORS["test"] if not phrase.startswith("{")]
    sentences = [command.sentence for command in commands("test", 400)]
    assert sum(any(opening in sentence for opening in openings) for sentence in sentences) > 80


def test_test_split_has_slips_of_the_keyboard() -> None:
    known = {word for phrases_of_kind in entries("test").values() for text in phrases_of_kind for word in text.split(" ")}
    known |= set(ARTICLES)
    sentences = [command.sentence.replace(",", "") for command in commands("test", 400)]
    misspelled = [sentence for sentence in sentences if set(sentence.split(" ")) - known]
    assert 60 < len(misspelled) < 160


def test_every_action_and_manner_occurs() -> None:
    drawn = commands("dev", 500)
    assert {c.action for c in drawn} == set(phrases.ACTIONS)
    assert {c.manner for c in drawn} == {None, *phrases.MANNERS}


def test_row_is_prompt_and_completion() -> None:
    command = Command("open the door", "open", "door", None, None)
    assert command.row() == {
        "prompt": "text: open the door keys: action, object, place, manner\n",
        "completion": '{"action": "open", "object": "door", "place": null, "manner": null}',
    }


@pytest.mark.parametrize("count", [-1, 200_001])
def test_refuses_impossible_counts(count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count}"):
        commands("train", count)
