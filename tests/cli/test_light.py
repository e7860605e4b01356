"""Help, version and a mistyped option are answered without torch; and what the real parser accepts is never refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import trl
from transformers import HfArgumentParser

from shadow_peft.cli import declared_fields, main, spelling
from shadow_peft.cli.dispatch import VERBS
from shadow_peft.cli.options import OPTIONS, TRL_OPTIONS
from shadow_peft.cli.parsing import VerbParser

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "lm_eval", "safetensors", "huggingface_hub", "numpy")

MISTYPED = {
    "demo": (["--smoek"], "--smoke"),
    "train": (["--modle", "x"], "--model"),
    "pretrain": (["--max_stps", "3"], "--max_steps"),
    "generate": (["say:", "--temprature", "0.7"], "--temperature"),
    "classify": (["--adapter", "out", "text", "--shadowonly"], "--shadow_only"),
    "eval": (["--model=x", "--tsaks", "gsm8k"], "--tasks"),
    "cascade": (["say:", "--treshold", "0.7"], "--threshold"),
    "serve": (["--adapter", "a=out", "--prot", "1"], "--port"),
    "playground": (["--port", "8080", "--adaptr", "out"], "--adapter"),
    "export": (["out", "--ouptut", "x"], "--output"),
    "convert": (["out", "--modle", "x"], "--model"),
}


def answer(*arguments: str) -> tuple[int, str, str, str]:
    """Status, output, errors and the heavy modules that are loaded, of the command in a process of its own."""
    code = (
        "import sys\nfrom shadow_peft.cli import main\nstatus = main()\n"
        f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said, _, loaded = run.stderr.rpartition("loaded")
    return run.returncode, run.stdout, said, loaded.strip()


# ---------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []], ids=str)
def test_the_overview_loads_nothing(arguments: list[str]) -> None:
    status, shown, said, loaded = answer(*arguments)
    assert (status, said, loaded) == (0, "", "")
    assert all(f"  {verb}" in shown for verb in VERBS)


def test_the_version_loads_nothing() -> None:
    assert answer("--version") == (0, f"shadow-peft {version('shadow-peft')}\n", "", "")


def test_an_unknown_verb_loads_nothing() -> None:
    status, shown, said, loaded = answer("dance")
    assert (status, shown, loaded) == (2, "", "")
    assert "no verb 'dance'" in said


@pytest.mark.parametrize("verb", VERBS)
def test_a_mistyped_option_is_three_lines_and_loads_nothing(verb: str) -> None:
    arguments, meant = MISTYPED[verb]
    status, shown, said, loaded = answer(verb, *arguments)
    assert (status, shown, loaded) == (2, "", "")
    wrong, nearest, everything = said.splitlines()
    typed = next(a for a in reversed(arguments) if a.startswith("--"))
    assert wrong == f"shadow-peft {verb}: there is no option {typed}"
    assert nearest.removeprefix("nearest: ").split(", ")[0] == meant
    assert everything == f"all options: shadow-peft {verb} --help"


# ---------------------------------------------------------------- what is known


@pytest.mark.parametrize("name", TRL_OPTIONS["train"])
def test_fields_read_from_source_are_those_of_the_class(name: str) -> None:
    found = declared_fields.fields_in_source("trl", name)
    assert sorted(f.name for f in found) == sorted(f.name for f in dataclasses.fields(getattr(trl, name)) if f.init)


@pytest.fixture(scope="module")
def parsers() -> dict[str, VerbParser]:
    """The real parser of every verb."""
    return {verb: real_parser(verb) for verb in VERBS}


def real_parser(verb: str) -> VerbParser:
    if verb == "train":
        from shadow_peft.cli.train import make_train_parser

        return make_train_parser()
    parser = VerbParser(verb, OPTIONS[verb], "", "")
    if verb in ("generate", "cascade"):
        parser.add_argument("text", nargs="+" if verb == "generate" else "*")
    if verb == "export":
        parser.add_argument("shadow")
    if verb == "convert":
        parser.add_argument("adapter")
    return parser


@pytest.mark.parametrize("verb", VERBS)
def test_every_spelling_is_known(verb: str, parsers: dict[str, VerbParser]) -> None:
    known = spelling.names_parser(spelling.declared_fields(verb))
    assert known._option_string_actions.keys() == parsers[verb]._option_string_actions.keys()


#: Arguments of `train` behind the options that it requires.
ACCEPTED = [
    ["--learning_rate", "1e-3", "--learning-rate", "2"],
    ["--learning_rate=-1e-3", "--num-shadow-layers=2"],
    ["--warmup_steps", "-1", "--seed", "-5", "--weight_decay", "-.5"],
    ["--no_remove_unused_columns", "--no-skip-memory-metrics"],
    ["--export", "--chat", "True", "--bf16", "false"],
    ["--learning_r", "1", "--use_dor", "--max_st", "3"],
    ["--prompt", "-- {q}", "--completion", "- {a}", "--data_name", "-"],
    ["--class_names", "a", "b", "--lora_target_modules", "q_proj", "v_proj"],
    ["--completion", "", "--prompt=--x"],
]

REFUSED = [
    ["--modle", "x"],
    ["--model-", "x"],
    ["-model", "x"],
    ["--no_export"],
    ["--no_learning_rate"],
    ["--learning_ratee=1"],
    ["--shadow", "x"],  # more than one option begins with it
    ["--learning", "1", "--prompt", "-x"],
]


@pytest.mark.parametrize("arguments", ACCEPTED, ids=" ".join)
def test_what_the_parser_accepts_is_not_refused(arguments: list[str], parsers: dict[str, VerbParser]) -> None:
    required = ["--model", "m", "--data", "d", "--output", "o"]
    assert parsers["train"].parse_known_args([*required, *arguments])[1] == []
    assert spelling.complaint("train", [*required, *arguments]) is None


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_the_parser_refuses_is_refused(arguments: list[str], parsers: dict[str, VerbParser]) -> None:
    required = ["--model", "m", "--data", "d", "--output", "o"]
    try:
        refused = bool(parsers["train"].parse_known_args([*required, *arguments])[1])
    except SystemExit:
        refused = True
    assert refused
    said = spelling.complaint("train", [*required, *arguments])
    assert said is not None
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("train", ["--config", "recipe.yaml", "--output", "o"]),
        ("train", ["--config=recipe.yaml", "--output", "o"]),
        ("train", ["--modle", "x", "--help"]),
        ("train", ["a stray word", "--learning_rate", "-1e-3"]),  # of these the real parser has something better to say
        ("generate", ["- a list", "-5", "--model", "m", "--max-new-tokens=5"]),
        ("generate", ["--model", "m", "--", "--modle"]),
    ],
)
def test_what_is_no_option_is_left_to_the_parser(verb: str, arguments: list[str]) -> None:
    assert spelling.complaint(verb, arguments) is None


def test_every_mistyped_option_is_named() -> None:
    said = spelling.complaint("eval", ["--mod", "m", "--tasc", "x", "--zzzzzzzz"])
    assert said is not None
    assert said.splitlines()[0] == "shadow-peft eval: there is no option --tasc, --zzzzzzzz"
    said = spelling.complaint("eval", ["--zzzzzzzz"])
    assert said is not None
    assert said.splitlines()[1] == "nearest: none is spelled like it"


def test_without_trl_the_verb_has_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declared_fields, "find_spec", lambda name: None)
    assert spelling.complaint("train", ["--modle", "x"]) is None
    assert spelling.complaint("generate", ["--modle", "x"]) is not None


def test_config_may_be_given_with_an_equals_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("output: here\nseed: -1\n")
    assert main(["eval", "--model", "m", "--tasks", "t", f"--config={tmp_path / 'c.yaml'}"]) == 1
    assert "--seed must be 0 to 4294967295, got -1" in capsys.readouterr().err


# ---------------------------------------------------------------- reading source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package `declared` that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "declared" / "sub").mkdir(parents=True)
    yield tmp_path / "declared"
    for name in [name for name in sys.modules if name.partition(".")[0] == "declared"]:
        del sys.modules[name]


SUB = """
import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Optional
from .. import base as other
from ..base import Base as Parent

class Plain(Parent):
    ignored: int = 1

@dataclass
class Config(Plain):
    x: int = 2
    on: "bool" = True
    maybe: Optional[bool] = field(default=True)
    off: bool = False
    named: str = field(default="a", metadata={"help": "text", "aliases": ["--nom", "-n"]})
    kind: ClassVar[int] = 3
    hidden: int = dataclasses.field(init=False, default=4)
    late: list[str] = field(default_factory=list)
"""


def test_source_is_read_as_dataclasses_does(package: Path) -> None:
    (package / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .sub.module import Config as Config\n"
    )
    (package / "base.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Base:\n    b: int\n    on: bool = False\n"
    )
    (package / "sub" / "__init__.py").touch()
    (package / "sub" / "module.py").write_text(SUB)
    found = declared_fields.fields_in_source("declared", "Config")
    assert "declared" not in sys.modules
    from declared.sub.module import Config

    assert [f.name for f in found] == [f.name for f in dataclasses.fields(Config) if f.init]
    assert [f.name for f in found if f.is_true] == ["on", "maybe"]
    assert {f.name: f.aliases for f in found if f.aliases} == {"named": ("--nom", "-n")}
    of_every_verb = {"--config", "--help-all", "--help_all"}
    known = spelling.names_parser(found)._option_string_actions.keys() - of_every_verb
    assert known == HfArgumentParser(Config)._option_string_actions.keys()
    for name in [name for name in sys.modules if name.partition(".")[0] == "declared"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "source", ["from .missing import Config", "class Config(object.x): ...", "from x import *", "class ("]
)
def test_source_that_cannot_be_followed_is_an_error(source: str, package: Path) -> None:
    (package / "__init__.py").write_text(source)
    with pytest.raises((LookupError, OSError, SyntaxError)):
        declared_fields.fields_in_source("declared", "Config")
