"""`shadow-peft demo`: fine-tunes the embedded base on robot commands, with a shadow and with LoRA, offline."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.screen import Screen
from shadow_peft.demo.measure import side_by_side
from shadow_peft.demo.race import SHADOW, Contender, RaceSettings, race_base, race_lora, race_shadow, shadow_size
from shadow_peft.demo.report import draw_curves, examples, save_results, table
from shadow_peft.demo.robot_commands import commands

DESCRIPTION = "Fine-tunes an embedded model on an embedded task, offline, and compares it with PEFT LoRA of the same size."
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
    contenders = _contenders(settings, output)
    seconds = time.perf_counter() - started
    save_results(output / "results.json", settings, contenders, seconds)
    draw_curves(output / "curves.png", contenders)
    print(f"\n{table(contenders)}\n")
    print(examples(contenders, commands("test", settings.test_commands, settings.seed)))
    print(f"\n{seconds:.0f} s in all; adapter, exported shadow, curves.png and results.json are in {output}/")
    return contenders


def _contenders(settings: RaceSettings, output: Path) -> list[Contender]:
    """The contenders in the order of the table."""
    budget = shadow_size(settings)
    screen = Screen()
    screen.line(f"training base + shadow (ShadowPEFT, variant {SHADOW.variant!r}) and base + LoRA side by side")
    rows = [
        ("trained", f"{budget:,} parameters each"),
        ("steps", f"{settings.steps} of {settings.batch} commands"),
        ("output", str(output)),
    ]
    screen.panel("demo", rows)
    shadow, lora, bare = side_by_side(
        partial(race_shadow, settings, output), partial(race_lora, settings, budget), partial(race_base, settings)
    )
    return [*bare, *shadow, *lora]
