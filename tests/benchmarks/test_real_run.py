"""The harness of the comparison on the real base, with a tiny base: runs, locks, the plan, files of results and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import devices
from benchmarks.quality.methods import Contender
from benchmarks.quality.real import measures, plan
from benchmarks.quality.real import run as real
from benchmarks.quality.real.batches import collate
from benchmarks.quality.real.builder import build
from benchmarks.quality.real.packages import ROOT
from benchmarks.quality.real.plan import CHOOSING, RATES, Run, claimed, dev_loss, missing, rates
from benchmarks.quality.real.scoring import Answers, score
from benchmarks.quality.real.weights import load_base
from benchmarks.quality.training import IGNORE, Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that are compared

FEW = Settings(steps=2, batch=4, warmup=1)


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("lora", "commands"), ("lora", "headlines"), ("readout", "commands"), ("readout", "headlines"),
        ("published", "quartz"), ("peft-shadow", "commands"), ("lily", "headlines"), ("readout-zero-state", "commands"),
        ("published-frozen-untrained", "headlines"), ("readout-only", "commands"), ("readout-correction", "quartz"),
        ("lora-upper", "commands"), ("readout-upper", "headlines"),
    ],
)  # fmt: skip
def test_a_run_from_end_to_end(toy_base: Path, tmp_path: Path, method: str, task: str) -> None:
    wanted = Run(method, task, 0, 2e-3)
    real.carry_out(wanted, tmp_path, FEW)
    assert not wanted.failure(tmp_path).exists()
    result = json.loads(wanted.path(tmp_path).read_text())
    classifies, has_shadow = task == "headlines", method.startswith(("readout", "published"))
    test = result["test"]
    assert len(test["each"]["loss"]) == len(test["each"]["exact"]) == 6
    assert math.isclose(test["loss"], sum(test["each"]["loss"]) / sum(test["each"]["tokens"]), rel_tol=1e-4)
    assert test["exact"] == sum(test["each"]["exact"]) / 6
    assert ("detached_loss" in test) == (has_shadow or (method == "peft-shadow" and not classifies))
    assert (result["forgetting"]["after"] is None) == classifies
    assert (result["decoding"] is None) == (task != "commands" or method not in ("readout", "published"))
    assert 0 < result["bytes_saved"] < result["step_bytes"]
    assert result["trainable"] > 0
    assert "bfloat16" in result["precision"]


def test_zero_state_is_what_the_base_is_coupled_to(toy_base: Path) -> None:
    """With s = 0 the read-out of the attached model does not see the shadow, which still answers for itself."""
    inputs = {name: one for name, one in collate([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}]).items()}
    labels = inputs.pop("labels")
    assert labels.shape == (1, 4)
    logits = {}
    for method in ("readout", "readout-zero-state"):
        contender = build(method, load_base(), seed=0)
        torch.manual_seed(1)
        for parameter in contender.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        with torch.no_grad():
            logits[method] = contender.logits(inputs)
            for parameter in contender.model.peft_model.shadow_model.parameters():
                parameter.data.mul_(1.5)
            logits[f"{method} changed"] = contender.logits(inputs)
    for method, changes in (("readout", True), ("readout-zero-state", False)):
        (before, shadow_before), (after, shadow_after) = logits[method], logits[f"{method} changed"]
        assert torch.equal(before, after) != changes
        assert not torch.equal(shadow_before, shadow_after)


def test_scores_of_known_logits() -> None:
    """Two targets right with probability 3/4 each, and a row whose second target is wrong."""
    answers = Answers()
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, math.log(3.0)]], [[0.0, math.log(3.0)], [math.log(3.0), 0.0]]])
    answers.add(logits, torch.tensor([[1, 1], [1, 1]]))
    scores = answers.scores()
    assert answers.exact == [1, 0]
    assert scores["loss"] == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4, abs=1e-5)


def test_agreement_counts_targets(toy_base: Path) -> None:
    base = load_base()
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [IGNORE, 5, 6, 7]}]

    def half_opposed(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = base(**inputs).logits
        opposed = logits.clone()
        opposed[:, 1] *= -1
        return logits, opposed

    assert score(Contender(base, half_opposed), rows)["agreement"] == pytest.approx(2 / 3)


def test_bytes_saved_counts_storages_once() -> None:
    class Squares(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(10))

        def forward(self, values: torch.Tensor) -> object:
            product = self.weight * values  # keeps a parameter and an input, which do not count
            doubled = product.sin()  # keeps the product: 40 bytes
            return type("Output", (), {"loss": (doubled * doubled[:]).sum()})  # keeps one storage twice: 40 bytes

    assert measures.bytes_saved(Squares(), {"values": torch.ones(10)}) == 80


def test_the_most_that_is_allocated_at_once() -> None:
    before = torch.ones(5000)

    def work() -> torch.Tensor:
        first, second = torch.ones(1000), torch.ones(500)  # 6,000 bytes together
        del first
        return second + torch.ones(600)[:500] + before[:500]  # 2,000 + 2,400 + 2,000

    assert devices.most_allocated(work, "cpu") == 6400


def test_a_finished_run_is_not_repeated_and_an_error_is_kept(
    toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(real, "run", fails)
    words = ["--method", "lora", "--task", "quartz", "--lr", "1e-3", "--steps", "2", "--out", str(tmp_path)]
    assert real.main(words) == 0
    failure = Run("lora", "quartz", 0, 1e-3).failure(tmp_path)
    assert "no luck" in json.loads(failure.read_text())["error"]
    assert real.main(words) == 1  # it counts as done
    assert "Failed: lora--quartz--s0--lr0.001: RuntimeError" in capsys.readouterr().err
    failure.unlink()
    Run("lora", "quartz", 0, 1e-3).path(tmp_path).write_text("{}")
    assert real.main(words) == 1


@pytest.mark.parametrize("words", [["--steps", "2"], ["--device", "cuda"]])
def test_other_runs_never_mix_with_the_plans(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        real.main(["--method", "lora", "--task", "quartz", "--lr", "1e-3", *words])


def test_two_loops_do_different_runs(tmp_path: Path) -> None:
    with claimed(tmp_path) as first, claimed(tmp_path) as second:
        assert first is not None
        assert second is not None
        assert first != second
        with claimed(tmp_path, first) as again:
            assert again is None  # another process has it
    with claimed(tmp_path) as after:
        assert after == first  # the lock went, and there is no result


def losses(folder: Path, method: str, by_rate: dict[float, float]) -> None:
    """Results on both tasks on which rates are chosen."""
    for rate, loss in by_rate.items():
        for task in CHOOSING:
            Run(method, task, 0, rate).path(folder).write_text(json.dumps({"dev": {"loss": loss}}))


def test_a_grid_grows_until_the_best_rate_lies_inside(tmp_path: Path) -> None:
    assert rates("lora", tmp_path) == (sorted(RATES), None)
    losses(tmp_path, "lora", {1e-3: 1.0, 2e-3: 0.9, 4e-3: 0.8})
    assert dev_loss("lora", 1e-3, tmp_path) == 2.0
    assert rates("lora", tmp_path) == ([1e-3, 2e-3, 4e-3, 8e-3], None)
    assert Run("lora", "commands", 0, 8e-3) in missing(tmp_path)
    losses(tmp_path, "lora", {8e-3: 0.85})
    assert rates("lora", tmp_path) == ([1e-3, 2e-3, 4e-3, 8e-3], 4e-3)
    assert Run("lora", "quartz", 2, 4e-3) in missing(tmp_path)
    losses(tmp_path, "dora", {1e-3: 0.8, 2e-3: 0.9, 4e-3: 1.0})
    assert rates("dora", tmp_path) == ([5e-4, 1e-3, 2e-3, 4e-3], None)


def test_ablations_take_the_rate_of_their_variant(tmp_path: Path) -> None:
    losses(tmp_path, "readout", {1e-3: 1.0, 2e-3: 0.9, 4e-3: 1.0})
    planned = {run for run in missing(tmp_path) if run.method == "readout-zero-state"}
    assert {(run.task, run.seed, run.rate) for run in planned} == {(t, s, 2e-3) for t in CHOOSING for s in plan.SEEDS}


def test_further_tasks_are_run_by_the_main_methods_alone(tmp_path: Path) -> None:
    for method in ("lora", "dora"):
        losses(tmp_path, method, {1e-3: 1.0, 2e-3: 0.9, 4e-3: 1.0})
    planned = missing(tmp_path)
    assert {run.task for run in planned if run.method == "dora"} == set(plan.PLANNED)
    further = [run for run in planned if run.task in plan.FURTHER]
    assert further == planned[-len(further) :]
    assert {(run.method, run.task, run.seed, run.rate) for run in further} == {
        ("lora", task, seed, 2e-3) for task in plan.FURTHER for seed in plan.SEEDS
    }


def test_the_pages_command_for_one_cell_is_accepted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/quality.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if "benchmarks.quality.run --base smollm2 --method" in line]
    words = line.partition("--base smollm2 ")[2].split()
    assert real.main([*words[: words.index("--out")], "--out", str(tmp_path), "--list"]) == 0
    assert "readout commands 0 0.002" in capsys.readouterr().out


def test_the_committed_shadow_is_small_and_needs_its_base() -> None:
    folder = ROOT / "examples/shadows/smollm2-135m-instruct"
    weights = load_file(folder / "model.safetensors")
    facts = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))["facts"]
    assert (folder / "model.safetensors").stat().st_size < 12_000_000
    assert sum(tensor.numel() for tensor in weights.values()) == facts["trained_parameters"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not any("embed_tokens" in name or "lm_head" in name for name in weights)
