"""Tables and picture of the comparison on the real base: the bootstrap, ratios, what is missing, and the committed page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pages import put_between
from benchmarks.quality.real import report
from benchmarks.quality.real.bootstrap import mean, paired
from benchmarks.quality.real.picture import draw, label
from benchmarks.quality.real.plan import CHOOSING, FURTHER, PLANNED, RATES, SEEDS, Run
from benchmarks.quality.real.results import Results

EXAMPLES = 6


def write(folder: Path, method: str, task: str, seed: int, rate: float, loss: float = 1.0, shadow: bool = False) -> None:
    """A result whose every example has the loss `2 * loss` over two targets, and of which every second one is right."""
    each = {"loss": [2 * loss] * EXAMPLES, "tokens": [2] * EXAMPLES, "exact": [1, 0] * (EXAMPLES // 2)}
    test = {"loss": loss, "exact": 0.5, "each": each}
    if shadow:
        test |= {f"detached_{name}": value for name, value in test.items()} | {"agreement": 0.75}
    writes = task != "headlines"
    result = {
        "test": test, "dev": {"loss": loss + abs(np.log(rate / RATES[0]))}, "trainable": 4000 if shadow else 2000,
        "forgetting": {"before": 3.0 if writes else None, "after": 3.5 if writes else None},
        "cpu_seconds": 50.0 if shadow else 100.0, "bytes_saved": 10, "step_bytes": 20,
        "decoding": dict.fromkeys(report.DRAFTING, 2.0 if task == "commands" else 9.0) if shadow and writes else None,
    }  # fmt: skip
    Run(method, task, seed, rate).path(folder).write_text(json.dumps(result))


def choose(folder: Path, method: str, loss: float = 1.0, shadow: bool = False) -> None:
    """The grid of a method, of which the first rate is best."""
    for task in CHOOSING:
        for rate in RATES:
            write(folder, method, task, SEEDS[0], rate, loss, shadow)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """LoRA and `readout` complete, of `published` the grid alone, and of all else nothing."""
    for method, loss in (("lora", 1.0), ("readout", 0.9)):
        choose(tmp_path, method, loss, shadow=method == "readout")
        for task in PLANNED:
            for seed in SEEDS:
                write(tmp_path, method, task, seed, RATES[0], loss, method == "readout")
    choose(tmp_path, "published", shadow=True)
    write(tmp_path, "readout-zero-state", "commands", 0, RATES[0], 0.8, shadow=True)
    write(tmp_path, "readout-zero-state", "headlines", 0, RATES[0], 0.8, shadow=True)
    return Results(tmp_path)


def row(text: str, method: str) -> list[str]:
    """The cells of a method's first row in a table."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_bootstrap_of_two_examples_by_hand() -> None:
    """Differences 0 and 1: a draw is 0, 1/2 or 1 with the probabilities 1/4, 1/2 and 1/4."""
    found = paired(np.array([[0.0, 1.0]]), np.zeros((1, 2)), np.ones(2))
    shares = [(found.draws == value).mean() for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert (found.estimate, found.interval) == (0.5, (0.0, 1.0))


def test_bootstrap_draws_seeds_too_and_weighs_by_targets() -> None:
    by_seed = paired(np.array([[3.0, 3.0], [6.0, 6.0]]), np.array([[3.0, 3.0]] * 2), np.array([1.0, 1.0]))
    assert sorted(set(by_seed.draws)) == [0.0, 1.5, 3.0]
    weighted = paired(np.array([[1.0, 4.0]]), np.zeros((1, 2)), np.array([1.0, 3.0]))
    assert weighted.estimate == 5 / 4
    assert sorted(set(weighted.draws)) == [1.0, 1.25, pytest.approx(4 / 3)]


def test_pairing_removes_what_both_methods_share() -> None:
    shared = np.random.default_rng(1).normal(size=(3, 50))
    found = paired(shared + 0.25, shared, np.ones(50))
    assert found.interval == pytest.approx((0.25, 0.25))
    assert mean([found, paired(shared, shared, np.ones(50))]).interval == pytest.approx((0.125, 0.125))


def test_rows_of_complete_partial_and_missing_methods(results: Results) -> None:
    text = report.quality_table(results, PLANNED)
    assert row(text, "lora") == ["lora", "1.000", "-", "50.0", "-", "-", "-", "-", "0.500", "0.500", "9 of 9"]
    differences = ["-0.100 [-0.100, -0.100]", "+0.0 [+0.0, +0.0]"]
    shadow = ["0.900", "50.0", "0.750", "0.500", "0.500", "9 of 9"]
    assert row(text, "readout") == ["readout", "0.900", differences[0], "50.0", differences[1], *shadow]
    assert row(text, "published") == ["published", *["-"] * 7, "0.500", "-", "2 of 9"]
    assert row(text, "dora") == ["dora", *["-"] * 9, "0 of 9"]


def test_ours_less_the_others(results: Results) -> None:
    text = report.versus_table(results, CHOOSING)
    none, tenth = ["+0.000 [+0.000, +0.000]", "+0.0 [+0.0, +0.0]"], ["-0.100 [-0.100, -0.100]", "+0.0 [+0.0, +0.0]"]
    assert row(text, "lora") == ["lora", *none, *tenth, "-", "-"]
    assert row(text, "dora") == ["dora", *["-"] * 6]


def test_further_tasks_are_each_compared_with_lora(results: Results) -> None:
    for method, loss in (("lora", 1.0), ("readout", 1.2)):
        write(results.folder, method, "mails", SEEDS[1], RATES[0], loss, method == "readout")
    lines = {tuple(line.strip("| ").split(" | ")[:2]): line for line in report.further_table(results).splitlines()[2:]}
    assert list(lines) == [(task, method) for task in FURTHER for method in ("lora", "published", "readout")]
    cells = [cell.strip() for cell in lines["mails", "readout"].strip("|").split("|")]
    assert cells[2:8] == ["1.200", "+0.200 [+0.200, +0.200]", "50.0", "+0.0 [+0.0, +0.0]", "1.200", "50.0"]
    assert cells[8:] == ["9.00", "9.00", "1 of 3"]
    assert lines["robot", "published"] == "| robot | published |" + " - |" * 8 + " 0 of 3 |"


def test_costs_are_ratios_on_the_same_task(results: Results) -> None:
    text = report.cost_table(results, PLANNED)
    assert row(text, "readout") == ["readout", "4,000", "0.50", "1.00", "1.00", *["2.00"] * 4]
    assert row(text, "lora")[2:] == ["1.00"] * 3 + ["-"] * 4
    assert row(text, "published")[1:3] == ["4,000", "-"]


def test_means_are_over_the_tasks_that_every_begun_method_has(results: Results) -> None:
    """`published` was begun on the tasks of the grid, so that the means of all leave QuaRTz out."""
    assert results.common_tasks(report.METHODS, PLANNED) == CHOOSING
    assert results.common_tasks(("lora", "readout", "dora"), PLANNED) == PLANNED
    for seed in SEEDS[:2]:
        write(results.folder, "published", "quartz", seed, RATES[0], shadow=True)
    assert Results(results.folder).common_tasks(report.METHODS, PLANNED) == PLANNED  # as long as none is complete
    for task in CHOOSING:
        for seed in SEEDS:
            write(results.folder, "published", task, seed, RATES[0], shadow=True)
    assert Results(results.folder).common_tasks(report.METHODS, PLANNED) == CHOOSING
    text = report.markdown(results)
    assert "means over commands, headlines\n" in text
    assert row(text, "published")[1:3] == ["1.000", "+0.000 [+0.000, +0.000]"]


def test_ablation_is_compared_with_zero_state_on_common_seeds(results: Results) -> None:
    text = report.ablation_table(results)
    assert row(text, "readout-zero-state") == ["readout-zero-state", "0.800", "-", "50.0", "-", "2 of 6"]
    assert row(text, "readout")[1:3] == ["0.900", "+0.100 [+0.100, +0.100]"]
    assert row(text, "readout-only") == ["readout-only", *["-"] * 4, "0 of 6"]


def test_task_table_has_deviation_and_rate(results: Results) -> None:
    assert row(report.task_table(results, "quartz"), "readout")[1:3] == ["0.900 ± 0.000", "0.500 ± 0.000"]
    assert row(report.task_table(results, "commands"), "published")[-2:] == ["0.002", "1 of 3"]


def test_page_is_replaced_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    put_between(page, "new", report.BEGIN, report.END)
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        put_between(page, "new", report.BEGIN, report.END)


def test_picture_writes_its_figures(results: Results, tmp_path: Path) -> None:
    draw(results, report.METHODS, PLANNED, "lora", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "-0.100" in text
    assert "not run yet" in text


def test_committed_page_and_picture_are_of_the_committed_results() -> None:
    """If this fails: python -m benchmarks.quality.real.report"""
    results = Results()
    page = report.PAGE.read_text(encoding="utf-8")
    assert page.split(report.BEGIN)[1].split(report.END)[0].strip() == report.markdown(results)
    picture = report.PICTURE.read_text(encoding="utf-8")
    for method in report.METHODS[1:]:
        difference = results.difference(method, "lora", results.common_tasks(report.METHODS, PLANNED), "loss")
        assert label(difference, 3, 1.0) in picture
