"""The comparison of starting points, with a tiny base: runs, their text, interruptions, and the table of the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.starting_points import report
from benchmarks.starting_points.__main__ import main
from benchmarks.starting_points.cell import Settings, base_hash, pretrained, text
from benchmarks.starting_points.plan import STARTS, Cell, claimed
from shadow_peft.demo.embedded import load_tokenizer
from tests.pretraining.conftest import corpus_folder, model_folder, seeded
from tests.tiny_models import llama

__all__ = ["corpus_folder", "model_folder", "seeded"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of trl

SIZES = {
    "steps": 4, "batch": 2, "context": 16, "held_out": 3, "learning_rate": 0.01, "tune_steps": 2, "commands": 3,
    "drafted": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def shape_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    llama(vocab_size=300, num_hidden_layers=2, intermediate_size=24).config.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_folder: Path, corpus_folder: Path, shape_folder: Path) -> Settings:
    return Settings(corpus=corpus_folder, base=model_folder, shape=shape_folder, **SIZES)  # type: ignore[arg-type]


def words(settings: Settings, *more: str) -> list[str]:
    """The options of a run with these settings."""
    places = {"corpus": settings.corpus, "base": settings.base, "shape": settings.shape}
    return [*(str(word) for name, value in {**places, **SIZES}.items() for word in (f"--{name}", value)), *more]


def test_a_run_from_end_to_end(settings: Settings, tmp_path: Path) -> None:
    asked = words(settings, "--start", "distilled", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    assert main(asked) == 0
    result = json.loads((tmp_path / "out/distilled--s0.json").read_text())
    assert (result["start"], result["seed"], result["base"]) == ("distilled", 0, base_hash(settings.base))
    assert result["shadow"]["tokens"] == 4 * 2 * 16
    assert set(result["tuned"]) == {"1", "0.3"}
    losses = {tuned[path]["loss"] for tuned in result["tuned"].values() for path in ("attached", "detached")}
    assert len(losses) == 4  # another rate, and another path, is another model
    for tuned in result["tuned"].values():
        drafts = tuned["drafts"]
        assert drafts["tokens_per_pass"] == 1 + drafts["accepted"] / drafts["base_passes"]
        assert 1 <= drafts["drafted"] <= 3 * drafts["base_passes"]
    assert main(asked) == 1  # it is done
    assert not any((tmp_path / "work").rglob("*.safetensors"))


def test_starting_points_differ_in_what_they_read(settings: Settings, tmp_path: Path) -> None:
    """Figures on text are those of the stored shadow, which transformers loads; the untrained ones read nothing."""
    found = {}
    _, held_out = text(0, settings, load_tokenizer(settings.base))
    blocks = torch.tensor([row["input_ids"] for row in held_out])
    for start in STARTS:
        (tmp_path / start).mkdir()
        found[start] = pretrained(Cell(start, 0), settings, tmp_path / start)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / start / "start")
        with torch.no_grad():
            assert float(model(blocks, labels=blocks).loss) == pytest.approx(found[start]["held_out"], abs=1e-4)
    assert [one["tokens"] for one in found.values()] == [0, 0, 128, 128]
    assert len({one["held_out"] for one in found.values()}) == 4
    assert len({one["parameters"] for one in found.values()}) == 1


def test_no_two_seeds_read_the_same(settings: Settings) -> None:
    tokenizer = load_tokenizer(settings.base)
    streams, held_out = zip(*(text(seed, settings, tokenizer) for seed in (0, 1)), strict=True)
    assert held_out[0] == held_out[1]
    read = [{row["index"] for row in stream.take(settings.steps * settings.batch)} for stream in streams]
    assert read == [set(range(8)), set(range(8, 16))]


def test_an_interrupted_pretraining_ends_with_the_same_weights(settings: Settings, tmp_path: Path) -> None:
    cell = Cell("next token", 1)
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        if name == "resumed":
            shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
        pretrained(cell, settings, tmp_path / name)
    whole, resumed = (load_file(tmp_path / name / "start/model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_results_of_another_base_or_size_are_not_mixed(settings: Settings, tmp_path: Path) -> None:
    write(tmp_path, Cell("base layers", 0), base="another")
    with pytest.raises(SystemExit, match=r"has results of another base than .* such as base-layers--s0.json"):
        main(words(settings, "--next", "--out", str(tmp_path)))
    with pytest.raises(SystemExit):
        main(words(settings, "--next"))  # the committed folder, with other sizes
    write(tmp_path, Cell("base layers", 1))
    with pytest.raises(ValueError, match="differ in base"):
        report.results(tmp_path)


def test_two_loops_do_different_runs(tmp_path: Path) -> None:
    write(tmp_path, Cell("random", 0))
    with claimed(tmp_path) as first, claimed(tmp_path) as second:
        assert (first, second) == (Cell("base layers", 0), Cell("next token", 0))
        with claimed(tmp_path, first) as again:
            assert again is None


def write(folder: Path, cell: Cell, base: str = "abc", text_loss: float = 3.0) -> None:
    """A result that is better on the test split at the rate that is worse on the dev split."""

    def tuned(dev_loss: float, exact: float) -> dict[str, Any]:
        scores = {"loss": 0.5, "exact": exact}
        drafts = {"tokens_per_pass": 2.25, "acceptance": 0.5}
        return {"attached": scores, "detached": scores, "dev_loss": dev_loss, "drafts": drafts}

    result = {
        "start": cell.start, "seed": cell.seed, "base": base,
        "shadow": {"held_out": text_loss + cell.seed / 10, "tokens": 2048, "parameters": 1000},
        "tuned": {"1": tuned(1.0, 0.25), "0.3": tuned(2.0, 0.75)},
        "settings": {"tune_steps": 400, "commands": 300, "draft_tokens": 3, "drafted": 60},
    }  # fmt: skip
    cell.path(folder).write_text(json.dumps(result))


def test_the_table_takes_the_rate_that_dev_chose(tmp_path: Path) -> None:
    for seed in (0, 2):
        write(tmp_path, Cell("base layers", seed))
    found = report.results(tmp_path)
    lines = report.markdown(found).splitlines()
    (row,) = [line for line in lines if line.startswith("| base layers |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["2,048", "3.100 ± 0.141"]
    assert cells[4] == "25.0 ± 0.0"
    assert cells[-2:] == ["1", "2 of 3"]
    assert "| random | - | - |" in "\n".join(lines)
    report.draw(found, tmp_path / "a.svg")
    assert "3.10" in (tmp_path / "a.svg").read_text()
    assert report.markdown(report.results(tmp_path / "none")) == report.NOT_MEASURED


def test_the_committed_page_has_the_table_of_the_committed_results() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    shown = page.split(report.BEGIN)[1].split(report.END)[0]
    assert shown.strip() == report.markdown(report.results())
