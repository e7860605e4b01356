"""`shadow-peft demo`: fine-tunes the embedded base on robot commands, with a shadow and with LoRA, offline."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.race_board import RaceBoard
from shadow_peft.cli.screen import Row, Screen
from shadow_peft.demo.measure import side_by_side
from shadow_peft.demo.race import (
    BASE_NAME,
    DETACHED_NAME,
    LORA_NAME,
    SHADOW,
    SHADOW_NAME,
    Contender,
    RaceSettings,
    race_base,
    race_lora,
    race_shadow,
    shadow_size,
)
from shadow_peft.demo.report import draw_results, examples, save_results, table
from shadow_peft.demo.robot_commands import commands

DESCRIPTION = """Fine-tunes an embedded model on an embedded task, offline, and compares it with
PEFT LoRA of the same size."""
EXAMPLES = """examples:
  shadow-peft demo                          everything; some minutes on two cores
  shadow-peft demo --output /tmp/race       results go to this folder
  shadow-peft demo --smoke                  a few steps, to check that everything runs
"""


def run(arguments: list[str]) -> None:
    """Parse the options, run the race and print the table."""
    options, _ = parse(VerbParser("demo", OPTIONS["demo"], DESCRIPTION, EXAMPLES), arguments)
    settings = replace(RaceSettings(), seed=options.seed)
    if options.smoke:
        settings = replace(settings, steps=3, batch=4, test_commands=4)
    hold_race(settings, options.output)


def hold_race(settings: RaceSettings, output: Path) -> list[Contender]:
    """Run every contender, print the table and write all files below `output`."""
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    screen = Screen()
    contenders = _contenders(settings, output, screen)
    seconds = time.perf_counter() - started
    save_results(output / "results.json", settings, contenders, seconds)
    draw_results(output / "results.png", contenders)
    test = commands("test", settings.test_commands, settings.seed)
    screen.line(f"\n{examples(contenders, test)}\n")
    best = max(contenders, key=lambda contender: contender.scores.exact_match)
    for line in table(contenders).splitlines():
        screen.line(line, "bold" if line.startswith(f"{best.name} ") else "")
    screen.line("")
    screen.panel("done", _summary(contenders, output, seconds))
    prompt = shlex.quote(test[0].prompt.replace("\n", "\\n"))
    screen.command("try it", f"shadow-peft generate --adapter {shlex.quote(str(output / 'adapter'))} {prompt}")
    return contenders


def _summary(contenders: Sequence[Contender], output: Path, seconds: float) -> list[Row]:
    """What the last panel says."""
    drafted = [contender.drafting for contender in contenders if contender.drafting is not None]
    return [
        ("time", f"{seconds:.0f} s"),
        *(("drafting", f"{d.tokens_per_pass:.1f} tokens a base pass, {d.speed:.2f}x as fast as the base") for d in drafted),
        ("adapter", f"{output / 'adapter'}, with its tokenizer"),
        ("shadow", f"{output / 'shadow'}, a standalone model"),
        ("picture", f"{output / 'results.png'}"),
        ("figures", f"{output / 'results.json'}"),
    ]


def _contenders(settings: RaceSettings, output: Path, screen: Screen) -> list[Contender]:
    """The contenders in the order of the table."""
    screen.line(f"training ShadowPEFT, variant {SHADOW.variant!r}, and LoRA side by side")
    with quiet_libraries():
        budget = shadow_size(settings)
    rows = [
        ("base", "embedded (llama, frozen)"),
        ("trained", f"{budget:,} parameters each"),
        ("steps", f"{settings.steps} of {settings.batch} commands"),
        ("device", "cpu; base in float32"),
    ]
    screen.panel("demo", rows)
    with RaceBoard(screen, (SHADOW_NAME, LORA_NAME), (BASE_NAME, SHADOW_NAME, DETACHED_NAME, LORA_NAME)) as board:
        shadow, lora, bare = side_by_side(
            partial(race_shadow, settings, output),
            partial(race_lora, settings, budget),
            partial(race_base, settings),
            listener=board.show,
        )
    return [*bare, *shadow, *lora]
