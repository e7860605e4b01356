"""The steps for a machine with a GPU: all of them at toy sizes on the CPU, resuming, failures, and sizes of contenders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import run, steps
from benchmarks.gpu.collect import requirements
from benchmarks.gpu.run import main
from benchmarks.gpu.steps import LARGE, Options, Step, plain
from benchmarks.shapes import SHAPES, Shape
from shadow_peft import ShadowConfig, get_shadow_model

TOY = ["--toy", "--device", "cpu"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A toy run names its cache in the environment, which is put back."""
    monkeypatch.setenv("SHADOW_BENCHMARK_CACHE", str(tmp_path / "cache"))


def test_every_step_at_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results"
    assert main([*TOY, "--results", str(folder)]) == 0, capsys.readouterr().out
    names = [step.name for step in steps.steps(Options("cpu", True, folder))]
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    assert all(content["toy"] and content["hardware"]["torch"] == torch.__version__ for content in found.values())
    assert found["tests"]["result"]["passed"] == 2
    assert set(found["train-toy-ours"]["result"]["rows"]) == {"LoRA", "ours"}
    rows = found["decode-toy-drafts-0.8"]["result"]["rows"]
    assert rows["ours, drafts right 80%"]["tokens_per_base_pass"] > 1
    assert found["quality"]["result"]["runs"] == 1
    assert found["quality"]["result"]["failed"] == []
    assert found["pretrain"]["result"]["tokens"] == 2 * 2 * 16
    capsys.readouterr()
    assert main([*TOY, "--results", str(folder)]) == 0
    assert capsys.readouterr().out == "All steps are done.\n"  # nothing is repeated


def use(monkeypatch: pytest.MonkeyPatch, *made: Step) -> None:
    """These steps in place of the real ones."""
    monkeypatch.setattr(run, "steps", lambda options: list(made))


def test_a_long_step_goes_on_and_a_failed_one_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: list[Any] = [None, None, {"parts": 3}]

    def fails(options: Options) -> None:
        raise ValueError("out of memory")

    use(monkeypatch, Step("first", fails), Step("long", lambda options: parts.pop(0)))
    where = [*TOY, "--results", str(tmp_path)]
    assert main([*where, "--step", "long"]) == 0
    assert not (tmp_path / "long.json").exists()
    assert main(where) == 1
    assert json.loads((tmp_path / "long.json").read_text())["result"] == {"parts": 3}
    assert "ValueError: out of memory" in (tmp_path / "failed/first.txt").read_text()
    use(monkeypatch, Step("first", lambda options: {"now": "works"}), Step("long", fails))
    assert main([*where, "--next"]) == 0
    assert not (tmp_path / "failed/first.txt").exists()
    assert main([*where, "--list"]) == 0
    assert capsys.readouterr().out.endswith("done     first\ndone     long\n")
    assert main([*where, "--step", "other"]) == 2


@pytest.mark.parametrize("words", [["--toy"], ["--device", "cpu"]])
def test_trials_do_not_mix_with_results(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)


def test_a_missing_gpu_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path)])
    assert "no CUDA GPU" in capsys.readouterr().err


def test_what_was_not_carried_along_is_named(tmp_path: Path) -> None:
    options = Options("cpu", False, tmp_path)
    for step in (steps.quality, steps.pretrain, lambda _: steps.peer()):
        with pytest.raises(steps.StepError, match="make wheels"):
            step(options)


def test_steps_have_names_of_files() -> None:
    names = [step.name for step in steps.steps(Options("cuda", False, Path()))]
    assert len(names) == len(set(names)) == 3 + len(LARGE) * (len(steps.DECODING) + len(steps.ORACLES) + len(steps.TRAINING))
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names)
    assert plain("peft's Shadow") == "pefts-shadow"


@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize("kind", ["lora", "dora", "tuner", "published", "readout"])
def test_contenders_train_as_much(kind: str) -> None:
    import peft

    shape = Shape(6, 128, 384, 4, 2, head_dim=32, vocabulary=100)
    base = shape.random_base("cpu", "float32")
    if kind in ("lora", "dora"):
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **shape.lora(kind == "dora")))
    elif kind == "tuner":
        model = peft.get_peft_model(base, peft.ShadowConfig(task_type="CAUSAL_LM", **shape.tuner()))
    else:
        model = get_shadow_model(base, ShadowConfig(**{"variant": kind, **getattr(shape, kind)()}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == pytest.approx(shape.budget, rel=0.03)


def test_the_shapes_have_the_sizes_of_their_names() -> None:
    for name, billions in (("qwen3-0.6b", 0.596), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19)):
        shape = SHAPES[name]
        layer = shape.attention + 3 * shape.width * shape.mlp
        tables = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        assert shape.layers * layer + tables == pytest.approx(billions * 1e9, rel=0.005)
        assert 0.005 < shape.budget / (billions * 1e9) < 0.025


def test_torch_is_not_carried_along() -> None:
    names = {requirement.partition("==")[0] for requirement in requirements()}
    assert {"transformers", "peft", "accelerate"} <= names
    assert not {"torch", "triton", "shadow-peft"} & names
    assert not any(name.startswith("nvidia-") for name in names)
