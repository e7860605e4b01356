"""The race: equal sizes, honest tables, and every file of a short demo."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from threading import Timer

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowForCausalLM, get_shadow_model
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.cli import main
from shadow_peft.cli.race_board import RaceBoard
from shadow_peft.cli.screen import Screen
from shadow_peft.demo.embedded import BASE_PATH, SHADOW_PATH, load_base, load_shadow, load_tokenizer
from shadow_peft.demo.measure import in_own_process, peak_memory_mb, side_by_side
from shadow_peft.demo.race import Contender, Progress, RaceSettings, Training, lora_rank, shadow_size
from shadow_peft.demo.report import draw_results, examples, save_results, table
from shadow_peft.demo.robot_commands import commands
from shadow_peft.demo.scoring import Scores
from tests.tiny_models import llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_of(base: torch.nn.Module, budget: int) -> int:
    """Trainable parameters of the LoRA that is raced against a budget."""
    rank = lora_rank(base, budget)
    return trainable(get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")))


def test_lora_is_as_large_as_the_shadow() -> None:
    budget = shadow_size(RaceSettings())
    assert budget == trainable(get_shadow_model(load_base(), RaceSettings().shadow, shadow_model=load_shadow()))
    assert lora_of(load_base(), budget) == pytest.approx(budget, rel=0.03)


def test_lora_rank_comes_as_near_as_a_rank_can() -> None:
    unit = lora_of(llama(), 1)
    assert lora_rank(llama(), 7 * unit + unit // 3) == 7
    assert lora_of(llama(), 7 * unit) == 7 * unit


def test_embedded_base_is_small_bfloat16_and_knows_its_tokens() -> None:
    weights = load_file(BASE_PATH / "model.safetensors")
    assert sum(path.stat().st_size for path in BASE_PATH.iterdir()) < 12_000_000
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    tokenizer, base = load_tokenizer(), load_base()
    text = 'Grüße, "Welt" 123\n'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (base.config.pad_token_id, base.config.eos_token_id)
    assert base.get_input_embeddings().num_embeddings == len(tokenizer)


def test_embedded_shadow_is_small_and_has_the_table_of_the_base() -> None:
    weights, base = load_file(SHADOW_PATH / "model.safetensors"), load_file(BASE_PATH / "model.safetensors")
    assert sum(path.stat().st_size for path in SHADOW_PATH.iterdir()) < 4_000_000
    assert torch.equal(weights["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert input_embeddings(load_shadow()) is None


def board(terminal: bool) -> tuple[RaceBoard, StringIO]:
    """A board of three contenders, and what it writes."""
    screen, written = Screen(), StringIO()
    screen.console = Console(file=written, force_terminal=terminal, width=80, highlight=False, color_system=None)
    return RaceBoard(screen, ("base + shadow", "LoRA"), ("bare base", "base + shadow", "detached shadow", "LoRA")), written


def test_a_pipe_gets_a_line_for_every_tenth() -> None:
    shown, written = board(terminal=False)
    with shown:
        for step in range(1, 101):
            shown.show(Progress("LoRA", "training", step, 100, {"loss": 1 / step}))
        shown.show(Progress("LoRA", "test", 50, 300))
    lines = written.getvalue().splitlines()
    assert lines[0] == "LoRA             step 1/100  loss 1.000"
    assert [int(re.search(r"step (\d+)", line)[1]) for line in lines[1:-1]] == list(range(10, 101, 10))  # type: ignore[index]
    assert lines[-1] == "LoRA             answered 50/300 test commands"


def test_a_terminal_gets_one_table() -> None:
    shown, written = board(terminal=True)
    with shown:
        shown.show(Progress("base + shadow", "training", 200, 400, {"loss": 0.25, "detached": 0.75}))
        shown.show(Progress("bare base", "test", 300, 300))
    last = written.getvalue().rpartition("training")[2].splitlines()
    rows = {name: next(line for line in last if line.startswith(name)) for name in ("bare", "base +", "detached", "LoRA")}
    assert rows["base +"].split()[3:6] == ["━" * 8, "200/400", "0.250"]
    assert rows["detached"].split()[2] == "0.750"
    assert rows["bare"].split()[2:] == ["━" * 16, "300/300"]
    assert rows["LoRA"].split() == ["LoRA"]
    assert all(len(line) <= 80 for line in last)


def made_up_contenders() -> list[Contender]:
    lines = ["{}", "two\nlines"]
    training = Training(1234, 5.6, 789.0, {"answer": [(1, 2.0), (2, 1.0)], "detached shadow": [(1, 3.0), (2, 2.5)]})
    return [
        Contender("bare base", Scores(0.0, 0.25, 3.5, lines)),
        Contender("base + shadow", Scores(0.5, 0.75, 0.5, lines), training),
    ]


def test_table_says_what_was_measured() -> None:
    lines = table(made_up_contenders()).splitlines()
    assert [cell.strip() for cell in lines[2].split("  ") if cell] == ["bare base", "0.0%", "25.0%", "3.500", "-", "-", "-"]
    assert [cell.strip() for cell in lines[3].split("  ") if cell][1:] == ["50.0%", "75.0%", "0.500", "1,234", "6", "789"]
    assert len({len(line) for line in lines}) == 1


def test_examples_show_every_answer_on_one_line() -> None:
    shown = examples(made_up_contenders(), commands("test", 2), count=2)
    assert shown.count("(right)") == 2
    assert "two | lines" in shown


def test_results_and_picture_are_written(tmp_path: Path) -> None:
    save_results(tmp_path / "results.json", RaceSettings(), made_up_contenders(), 12.3)
    draw_results(tmp_path / "results.png", made_up_contenders())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["contenders"][1]["training"]["trainable"] == 1234
    assert results["contenders"][1]["drafting"] is None
    assert results["settings"]["shadow"]["injection_hidden_size"] == RaceSettings().shadow.injection_hidden_size
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_work_in_its_own_process_has_its_own_peak() -> None:
    assert 5 < in_own_process(peak_memory_mb) < peak_memory_mb() + 1000
    with pytest.raises(ValueError, match="got -1"):
        in_own_process(commands, "train", -1)


def say_and_return(count: int, report: Callable[[object], object]) -> int:
    """Reports the numbers below `count`; returns the process."""
    for number in range(count):
        report((count, number))
    return os.getpid()


def test_work_side_by_side_runs_in_different_processes_and_is_heard_in_order() -> None:
    heard: list[tuple[int, int]] = []
    first, second = side_by_side(partial(say_and_return, 300), partial(say_and_return, 20), listener=heard.append)
    assert len({first, second, os.getpid()}) == 3
    for count in (300, 20):
        assert [number for of, number in heard if of == count] == list(range(count))


def sleep(report: object) -> None:
    time.sleep(600)


def fail(report: object) -> None:
    commands("train", -1)


@pytest.mark.parametrize("ended_by", ["an interrupt", "an error"])
def test_nothing_goes_on_where_one_fails(ended_by: str, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    if ended_by == "an error":
        with pytest.raises(ValueError, match="got -1"):
            side_by_side(sleep, sleep, fail, listener=print)
    else:
        Timer(4, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            side_by_side(sleep, sleep, listener=print)
    assert time.monotonic() - started < 120
    assert "Traceback" not in capfd.readouterr().err


def test_demo_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "shadow_peft.cli", "demo", "--smoke", "--output", str(tmp_path / "race")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["race"]
    shown = done.stdout
    results = json.loads((tmp_path / "race" / "results.json").read_text())
    names = [contender["name"] for contender in results["contenders"]]
    assert names[:3] == ["bare base", "base + shadow", "detached shadow"]
    assert names[3].startswith("LoRA")
    drafting = results["contenders"][1]["drafting"]
    assert drafting["tokens_per_pass"] >= 1
    assert f"{drafting['tokens_per_pass']:.1f} tokens a base pass, {drafting['speed']:.2f}x as fast as the base" in shown
    assert all(name in shown for name in names)
    lines = shown.splitlines()
    for step in (1, 2, 3):
        assert any(re.fullmatch(rf"base \+ shadow    step {step}/3  loss [\d.]+  detached [\d.]+", line) for line in lines)
        assert any(re.fullmatch(rf"LoRA             step {step}/3  loss [\d.]+", line) for line in lines)
    assert "detached shadow  answered 4/4 test commands" in lines
    assert not any("it/s" in line or "{'" in line for line in lines)
    assert lines[-2:-1] == ["try it:"]
    assert main([*shlex.split(lines[-1])[1:], "--max_new_tokens", "2"]) == 0
    check_files(tmp_path / "race", results)


def check_files(folder: Path, results: dict[str, list[dict[str, dict[str, object]]]]) -> None:
    """The saved adapter and the saved shadow give the answers that the results report."""
    prompts = [command.prompt for command in commands("test", 4)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "shadow")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    adapted = ShadowForCausalLM.from_pretrained(load_base(), folder / "adapter")
    detached = AutoModelForCausalLM.from_pretrained(folder / "shadow")
    for model, contender in ((adapted, results["contenders"][1]), (detached, results["contenders"][2])):
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        written = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [line.strip() for line in written] == contender["scores"]["answers"]
    assert (folder / "results.png").is_file()
    assert replace(RaceSettings(), steps=3).steps == results["settings"]["steps"]  # type: ignore[call-overload]
