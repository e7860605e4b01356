"""The parser of every verb: switches, files of options, help in sections, errors of two lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from shadow_peft.cli import main
from shadow_peft.cli.dispatch import VERBS
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.sections import SECTIONS, TEXTS
from shadow_peft.config import ShadowConfig
from tests.cli.test_light import real_parser

TRAIN = ["--model", "m", "--data", "d", "--output", "o"]


def generate_parser() -> VerbParser:
    parser = VerbParser("generate", OPTIONS["generate"], "", "")
    parser.add_argument("text", nargs="+")
    return parser


def generate(*arguments: str) -> tuple[Any, Any, list[str]]:
    """What `generate` makes of its arguments: options, those of sampling, texts."""
    options, sampling, _, others = parse(generate_parser(), ["--model", "m", *arguments])
    return options, sampling, others.text


@pytest.fixture(scope="module")
def train_parser() -> VerbParser:
    return real_parser("train")


def train(*arguments: str) -> tuple[Any, ...]:
    return parse(real_parser("train"), [*TRAIN, *arguments])


# ---------------------------------------------------------------- switches


def test_a_switch_leaves_the_next_word_alone() -> None:
    options, sampling, texts = generate("--chat", "Hello", "--do_sample", "--temperature", "0.7")
    assert (options.chat, sampling.do_sample, sampling.temperature, texts) == (True, True, 0.7, ["Hello"])


@pytest.mark.parametrize(
    ("arguments", "chat", "texts"),
    [
        (["--chat", "True", "Hello"], True, ["Hello"]),
        (["--chat", "false", "Hello"], False, ["Hello"]),
        (["--chat=yes", "Hello"], True, ["Hello"]),
        (["--chat=0", "Hello"], False, ["Hello"]),
        (["--cha", "yes"], True, ["yes"]),  # a text, since generate takes texts
        (["Hello", "--chat"], True, ["Hello"]),
        (["--", "--chat"], False, ["--chat"]),
    ],
)
def test_the_value_of_a_switch_may_be_spelled_out(arguments: list[str], chat: bool, texts: list[str]) -> None:
    options, _, found = generate(*arguments)
    assert (options.chat, found) == (chat, texts)


def test_every_switch_of_train_is_one() -> None:
    options, _, _, sft, peft, _ = train("--export", "--bf16", "no", "--tf32", "0", "--use_dor", "--no_dataloader_pin_memory")
    assert (options.export, sft.bf16, sft.tf32, peft.use_dora, sft.dataloader_pin_memory) == (
        True,
        False,
        False,
        True,
        False,
    )
    _, _, _, sft, _, _ = train("--disable-tqdm", "--load_best_model_at_end", "False")
    assert (sft.disable_tqdm, sft.load_best_model_at_end) == (True, False)


def test_the_old_name_of_activation_checkpointing_is_heard() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        sft = train("--gradient_checkpointing")[3]
    assert sft.activation_checkpointing
    assert not train()[3].activation_checkpointing


# ---------------------------------------------------------------- files of options


def test_a_file_sets_what_the_command_line_may_override(tmp_path: Path) -> None:
    recipe = {
        **{"model": "a", "data": "d", "output": 5, "export": True, "class_names": ["-1", "2"], "class_column": "c"},
        **{"prompt": "p", "completion": "c", "learning_rate": "1e-4", "max_steps": 7, "eval_steps": None, "alpha": 1},
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "modules_to_save": [],
        "resume_from_checkpoint": True,
        "no_such_thing": None,
    }
    del recipe["no_such_thing"]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    parser = real_parser("train")
    options, templates, shadow, sft, _, _ = parse(parser, ["--config", str(path), "--model", "b", "--export", "no"])
    assert (options.model, options.output, options.export, shadow.alpha) == ("b", "5", False, 1.0)
    assert (templates.class_names, sft.learning_rate, sft.max_steps) == (["-1", "2"], 1e-4, 7)
    assert (sft.eval_steps, sft.lr_scheduler_kwargs, sft.resume_from_checkpoint) == (None, {"num_cycles": 2}, "True")


def test_variables_of_the_environment_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHADOW_PEFT_TEST", raising=False)
    (tmp_path / "r.yaml").write_text("env: {SHADOW_PEFT_TEST: 3}\nmax_new_tokens: 4\n")
    _, sampling, _ = generate("x", "--config", str(tmp_path / "r.yaml"))
    assert (os.environ.pop("SHADOW_PEFT_TEST"), sampling.max_new_tokens) == ("3", 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_steps: a", "max_steps: invalid int value: 'a'"),
        ("max_steps: 2.5", "max_steps: invalid int value: '2.5'"),
        ("max_steps: [1, 2]", "max_steps: invalid value: [1, 2]"),
        ("learning_rate: {a: 1}", "learning_rate: invalid value: {'a': 1}"),
        ("export: 3", "Truthy value expected"),
        ("variant: other", "invalid choice: 'other'"),
        ("class_names: [[1]]", "class_names: invalid value"),
        ("prompt: {a: 1}", "prompt: invalid value"),
        ("- a\n- b", "must be a YAML mapping of options, it is a list"),
        ("", "it is a NoneType"),
        ("env: 3", "env must be a mapping"),
        ("learning_rat: 3", "there is no option learning_rat; nearest: learning_rate"),
        ("model: [", "is no YAML"),
        ("config: x", "there is no option config"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text: str, said: str, tmp_path: Path, train_parser: VerbParser) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(train_parser, ["--config", str(path), *TRAIN])
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_text_and_a_default(verb: str) -> None:
    parser = real_parser(verb)
    everything = parser.format_sections(everything=True)
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            assert action.help, action.dest
            said = " ".join(everything.partition(f"  {action.option_strings[0]}")[2].split("\n  --")[0].split())
            assert action.required or "default" in said, action.dest


@pytest.mark.parametrize("verb", VERBS)
def test_sections_name_options_that_are_there(verb: str) -> None:
    known = {action.dest for action in real_parser(verb)._actions}
    assert {name for names in SECTIONS[verb].values() for name in names} <= known
    assert verb != "train" or set(TEXTS) <= known


def test_help_is_short_and_grouped_and_help_all_is_complete(train_parser: VerbParser) -> None:
    short, whole = train_parser.format_help(), train_parser.format_sections(everything=True)
    titles = [line[:-1] for line in short.splitlines() if line.endswith(":") and not line.startswith((" ", "-"))]
    assert titles == ["what to train", "data", "shadow", "training", "LoRA baselines", "help", "examples"]
    assert len(short.splitlines()) < 220
    assert "--adam_beta1" not in short
    assert "--export " in short
    assert "EXPORT]" not in short
    options = {a.option_strings[0] for a in train_parser._actions if a.option_strings and not a.dest.startswith("no_")}
    lines = whole.splitlines()
    missing = {name for name in options if name[2:5] != "no_" and not any(f"{name}" in line for line in lines)}
    assert not missing


def test_help_all_is_an_option_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("--help-all", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--config", "nowhere.yaml", spelling])
        assert "--adam_beta1" in capsys.readouterr().out


def test_texts_of_the_shadow_are_those_of_its_docstring(train_parser: VerbParser) -> None:
    whole = " ".join(train_parser.format_sections(everything=True).split())
    assert "Rank r of the injection, at least 1; by default 16, or 64 in the variant" in whole
    assert "MLP width of an implicit backbone; by default the base's (default" not in whole
    for variant, value in (("published", 16), ("readout", 64)):
        assert ShadowConfig(variant=variant).injection_hidden_size == value  # type: ignore[arg-type]


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", *TRAIN, "--max_steps", "x"], "argument --max_steps/--max-steps: invalid int value: 'x'"),
        (["train", *TRAIN, "--optim", "adamw"], "(nearest: adamw_"),
        (["train", *TRAIN, "--variant", "released"], "(choose from published, peft, readout)"),
        (["train", *TRAIN, "--export=perhaps"], "Truthy value expected"),
        (["train", *TRAIN, "stray"], "nothing takes 'stray'"),
        (["train", "--model"], "expected one argument"),
        (["train", *TRAIN, "--model=--"], "argument --model: -- is no value"),
        (["train"], "the following arguments are required: --model, --data, --output"),
        (["generate", "x", "--model", "m", "--dtype", "foo"], "choose from auto, float32, bfloat16, float16"),
        (["generate", "--model", "m"], "the following arguments are required: text"),
        (["generate", "x", "--config"], "argument --config: expected one argument"),
        (
            ["eval", "--adapter", "a", "--tasks", "t", "--inference_mode", "base"],
            "choose from base_shadow, shadow_only, both",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_two_lines(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "eval":
        pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    assert shown[0].startswith(f"shadow-peft {arguments[0]}: ")
    assert said in shown[0]
    assert shown[1] == f"all options: shadow-peft {arguments[0]} --help"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "-1"], "--seed must be 0 to 4294967295, got -1"),
        (["--learning_rate", "nan"], "--learning_rate must be at least 0, got nan"),
        (["--learning_rate", "inf"], "--learning_rate must be at least 0, got inf"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "-2"], "--gradient_accumulation_steps must be at least 1"),
        (["--max_length", "-5"], "--max_length must be at least 1, got -5"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0"),
        (["--save_steps", "0"], "--save_steps must be above 0"),
        (["--adam_beta1", "2"], "--adam_beta1 must be 0 to 1"),
        (["--lora_dropout", "2", "--use_peft"], "--lora_dropout must be 0 to 1"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience must be at least 1"),
        (["--alpha", "nan"], "alpha must be a finite number, got nan"),
        (["--lr_scheduler_kwargs", "{"], "Expecting property name"),
        (["--load_in_4bit", "--load_in_8bit"], "8 bit and 4 bit"),
        (["--push_to_hub", "--hub_strategy", "end", "--eval_strategy", "steps"], "--eval_strategy needs --eval_data"),
    ],
)
def test_absurd_numbers_are_refused_before_anything_is_read(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TRAIN, *options]) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not Path("o").exists()
