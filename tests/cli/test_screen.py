"""What `train` shows: panels and bars on a terminal, plain lines in a pipe, nothing of the libraries beneath."""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from shadow_peft.cli import main
from shadow_peft.cli.errors import one_line
from shadow_peft.cli.progress import TrainingProgress, in_words
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.screen import Screen
from shadow_peft.cli.summary import example_prompt, next_command

EVERY_2 = ["--eval_strategy", "steps", "--eval_steps", "2"]
STEPS = ["--max_steps", "4", "--logging_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"]
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def screen(terminal: bool, width: int = 70) -> tuple[Screen, io.StringIO]:
    """A screen, and what is written on it."""
    shown, written = Screen(), io.StringIO()
    shown.console = Console(file=written, force_terminal=terminal, width=width, highlight=False, markup=False)
    return shown, written


def trained(model: Path, data: Path, out: Path, *options: str) -> list[str]:
    return ["train", "--model", str(model), "--data", str(data), "--output", str(out), *STEPS, *options]


# ---------------------------------------------------------------- in a pipe


@pytest.fixture(scope="module")
def piped(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str, Path]:
    """Lines of output, and errors, of a run in a process of its own without a terminal."""
    folder = tmp_path_factory.mktemp("piped")
    rows = [{"prompt": f"say {i}:\n", "completion": f" {i} {i}"} for i in range(16)]
    Dataset.from_list(rows).to_json(folder / "d.jsonl")
    arguments = trained(model_folder, folder / "d.jsonl", folder / "out", "--eval_fraction", "0.25", "--export", *EVERY_2)
    run = subprocess.run([sys.executable, "-m", "shadow_peft.cli", *arguments], capture_output=True, text=True, check=True)
    return run.stdout.splitlines(), run.stderr, folder / "out"


def test_a_pipe_gets_plain_lines(piped: tuple[list[str], str, Path]) -> None:
    lines, errors, _ = piped
    assert errors == ""
    assert lines[0].startswith("training ShadowPEFT, variant 'readout' (alternative: ")
    assert lines[1] == "train:"
    for name, said in (
        ("base", r".*tiny-base\d+ \(llama, 56,352 parameters, frozen\)"),
        ("method", "ShadowPEFT, variant 'readout'"),
        ("trained", r"30,848 parameters, 54\.74% of the base's"),
        ("data", r".*d\.jsonl: 12 rows for training, 4 for evaluation"),
        ("steps", r"4 of 4 rows, 1\.33 epochs"),
        ("device", "cpu; base in float32"),
    ):
        assert any(re.fullmatch(rf"  {name} +{said}", line) for line in lines), name
    steps = [line for line in lines if line.startswith("step ")]
    figures = r"loss [\d.]+  base\+shadow [\d.]+  shadow [\d.]+"
    assert [bool(re.fullmatch(rf"step [24]/4  {figures}  lr [\de.-]+", line)) for line in steps[::2]] == [True, True]
    assert re.fullmatch(rf"step 2/4  eval: {figures}  accuracy [\d.]+%", steps[1])
    assert len(steps) == 4
    assert sum(bool(re.fullmatch(rf"  validation +{figures}  accuracy [\d.]+%", line)) for line in lines) == 1
    assert any(line.endswith("shadow_adapter_readout.safetensors, with its tokenizer") for line in lines)
    assert not any("\x1b" in line or "\r" in line or "─" in line or "it/s" in line for line in lines)


def test_the_command_to_try_runs(piped: tuple[list[str], str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines, _, out = piped
    assert lines[-2] == "try it:"
    program, *arguments = shlex.split(lines[-1])
    assert program == "shadow-peft"
    assert arguments[:3] == ["generate", "--adapter", str(out)]
    assert arguments[3].startswith("say ")
    assert main([*arguments, "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "say 1:\n", "completion": "x"}, ("say 1:\\n", False)),
        ({"prompt": "long " * 50, "completion": "x"}, ("Hello", False)),
        ({"text": "once upon a time there was a robot"}, ("once upon a time there", False)),
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}, ("hi", True)),
        ({"prompt": [{"role": "system", "content": "s"}]}, ("Hello", True)),
    ],
)
def test_the_prompt_to_try_is_one_of_the_data(row: dict[str, Any], expected: tuple[str, bool]) -> None:
    assert example_prompt(Dataset.from_list([row])) == expected


def test_the_command_to_try_is_quoted() -> None:
    rows = Dataset.from_list([{"prompt": "- it's $HOME", "completion": "x"}])
    command = next_command("my out", rows, use_peft=True)
    assert shlex.split(command) == ["shadow-peft", "generate", "--model", "my out", "--", "- it's $HOME"]


# ---------------------------------------------------------------- on a terminal


def test_a_terminal_gets_panels_and_a_bar(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    arguments = trained(model_folder, data_file, tmp_path / "out", "--eval_fraction", "0.25")
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "shadow_peft.cli", *arguments], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait() == 0
    text = written.decode()
    assert "\x1b[" in text
    plain = ANSI.sub("", text)
    assert plain.startswith("training ShadowPEFT, variant 'readout'")
    assert plain.index("╭─ train ") < plain.index("training ━") < plain.index("evaluation ━") < plain.index("╭─ done ")
    assert "4/4" in plain
    bars = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("training ━")]
    assert max(map(len, bars)) == 118  # the ^C that a terminal echoes has room
    for noise in ("Tokenizing", "Loading weights", "examples/s", "Warning", "it/s"):
        assert noise not in plain


def test_bars_may_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    shown, written = screen(terminal=True)
    progress = TrainingProgress(shown, lambda steps: [("steps", str(steps))], bars=False)
    state = SimpleNamespace(global_step=1, max_steps=2)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 1.23456, "base_loss": 1.0, "grad_norm": 3.0})
    progress.on_log(None, state, None, logs={"train_loss": 1.0, "loss": 1.0})
    progress.on_train_end(None, state, None)
    plain = ANSI.sub("", written.getvalue())
    assert "step 1/2  loss 1.235  base+shadow 1\n" in plain
    assert plain.count("step 1/2") == 1
    assert "━" not in plain


def test_long_commands_are_not_broken() -> None:
    for terminal in (True, False):
        shown, written = screen(terminal, width=20)
        shown.command("try it", "shadow-peft generate --adapter [bold]out[/bold] :smile: " + "x" * 50)
        expected = "  shadow-peft generate --adapter [bold]out[/bold] :smile: " + "x" * 50
        assert expected in ANSI.sub("", written.getvalue()).splitlines()


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Screen(silent=True)
    shown.line("a")
    shown.panel("b", [("c", "d")])
    with shown.working("e"):
        pass
    assert capsys.readouterr().out == ""


def test_figures_in_words() -> None:
    assert in_words({"eval_loss": 1.0, "eval_mean_token_accuracy": 0.5, "eval_runtime": 3}, "eval_") == (
        "loss 1  accuracy 50.0%"
    )
    assert in_words({"loss": "a word", "epoch": 1.0}) == ""


# ---------------------------------------------------------------- libraries beneath


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("two\nlines", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: two lines\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a\n  b"), "a b"),
        (KeyError("x"), "KeyError 'x'"),
        (RuntimeError(), "RuntimeError"),
        (FileNotFoundError(2, "No such file", "f.txt"), "there is no file f.txt"),
        (ValueError("word " * 200), "word " * 80 + "..."),
    ],
)
def test_errors_of_libraries_are_one_line(error: Exception, said: str) -> None:
    assert one_line(error) == said
