"""The output folder: what is refused, what `--overwrite` removes and what stays, where a run resumes, and Ctrl-C."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from shadow_peft.cli import main
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.folders import checkpoint_to_resume, clear, old_run, what_is_missing
from shadow_peft.cli.progress import TrainingProgress
from tests.tiny_models import llama

QUICK = ["--use_cpu", "--disable_tqdm", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def finished(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole run, with two checkpoints and an exported shadow."""
    out = tmp_path_factory.mktemp("finished") / "out"
    options = ["--max_steps", "2", "--save_steps", "1", "--export"]
    assert main(["train", *places(model_folder, data_folder, out), *QUICK, *options]) == 0
    return out


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of data."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"prompt": f"say {i}:", "completion": f" {i} {i}"}) for i in range(16)]
    (folder / "d.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that output folder."""
    return shutil.copytree(finished, tmp_path / "out")


def places(model: Path, data: Path, out: Path) -> list[str]:
    return ["--model", str(model), "--data", str(data / "d.jsonl"), "--output", str(out)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


# ---------------------------------------------------------------- what is refused


def test_the_folder_of_the_base_is_never_the_output(
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    before = files(tmp_path)
    monkeypatch.chdir(base)
    for output in (str(base), ".", "../base/"):
        said = refused(capsys, "--model", str(base), "--data", str(data_folder), "--output", output, "--overwrite")
        assert "is what --model reads, which is never written into; give another folder" in said
    said = refused(capsys, "--model", "Qwen/x", "--data", str(data_folder), "--output", str(data_folder))
    assert "is what --data reads" in said
    said = refused(capsys, "--model", "Qwen/x", "--data", "d", "--output", str(base), "--overwrite")
    assert "holds a model (config.json); give another folder" in said
    assert files(tmp_path) == before


def test_an_old_run_is_refused_and_stays(
    run: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    said = refused(capsys, *places(model_folder, data_folder, run))
    assert "holds an earlier run (all_results.json, checkpoint-1, checkpoint-2, ...); give another folder" in said
    assert "--overwrite to replace it, or --resume_from_checkpoint last" in said
    elsewhere = run.parent / "elsewhere"
    shutil.copytree(run / "checkpoint-1", elsewhere / "checkpoint-1")
    other = str(elsewhere / "checkpoint-1")
    assert "--overwrite" in refused(capsys, *places(model_folder, data_folder, run), "--resume_from_checkpoint", other)
    assert files(run) == before


def test_an_exported_shadow_does_not_grow_stale(
    run: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *places(model_folder, data_folder, run), "--resume_from_checkpoint", "last")
    assert "was exported from this run; add --export to renew it, or remove it" in said


@pytest.mark.parametrize("name", ["README.md", "shadow"])
def test_a_file_of_others_that_would_be_replaced_is_refused(
    name: str, model_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    if name == "shadow":
        mine.mkdir()
    else:
        mine.write_text("mine")
    for more in (["--export"], ["--overwrite", "--export"]):
        said = refused(capsys, *places(model_folder, data_folder, tmp_path / "out"), *more)
        assert f"holds {name}, which is of no run and might be replaced; give another folder" in said


def test_a_folder_with_a_log_may_be_written_into(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("mine")
    options = ["--max_steps", "1", "--save_strategy", "no"]
    assert main(["train", *places(model_folder, data_folder, tmp_path / "out"), *QUICK, *options]) == 0
    assert (tmp_path / "out" / "log.txt").read_text() == "mine"


# ---------------------------------------------------------------- --overwrite


def test_overwriting_removes_what_is_ours_and_nothing_else(
    run: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("notes.txt", "shadow/notes.txt", "runs/events", "checkpoint-best/x", "data.npz"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    (run / "chat_template.jinja").write_text("of an older run")
    options = ["--max_steps", "1", "--save_strategy", "no", "--variant", "published", "--overwrite"]
    assert main(["train", *places(model_folder, data_folder, run), *QUICK, *options]) == 0
    left = set(files(run))
    mine = {"notes.txt", "shadow/notes.txt", "runs/events", "checkpoint-best/x", "data.npz"}
    ours = {"README.md", "all_results.json", "train_results.json", "trainer_state.json", "training_args.bin", "losses.png"}
    adapter = {"shadow_adapter.safetensors", "shadow_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert left == mine | ours | adapter


def test_a_model_of_others_beside_the_old_run_is_refused_before_anything_is_removed(
    run: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "data.safetensors").write_text("mine")
    before = files(run)
    assert main(["train", *places(model_folder, data_folder, run), *QUICK, "--overwrite"]) == 1
    assert "holds a model (data.safetensors); give another folder" in capsys.readouterr().err
    assert files(run) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft
def test_overwriting_by_another_method(run: Path, model_folder: Path, data_folder: Path) -> None:
    options = ["--max_steps", "1", "--save_strategy", "no", "--use_peft", "--lora_r", "2", "--overwrite"]
    assert main(["train", *places(model_folder, data_folder, run), *QUICK, *options]) == 0
    assert not list(run.glob("shadow*"))
    assert (run / "adapter_model.safetensors").is_file()


def test_nothing_is_removed_where_the_run_does_not_start(
    run: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    said = refused(capsys, *places(model_folder, data_folder, run), *QUICK, "--overwrite", "--report_to", "a_diary")
    assert "a_diary is not supported" in said
    assert files(run) == before


def test_clearing_takes_links_for_links(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.move(run / "checkpoint-1", kept)
    (run / "checkpoint-1").symlink_to(kept)
    (run / ".saving-abc").mkdir()
    clear(run)
    assert files(kept)
    assert files(run) == {}
    assert old_run(tmp_path / "nowhere") == []


# ---------------------------------------------------------------- resuming


def damage(checkpoint: Path, how: str) -> None:
    if how == "is no folder":
        shutil.rmtree(checkpoint)
        checkpoint.touch()
    elif how.startswith("has no"):
        (checkpoint / {"has no state": "trainer_state.json", "has no adapter": "shadow_config.json"}[how]).unlink()
    else:
        path = checkpoint / {"state": "trainer_state.json", "weights": "shadow_adapter_readout.safetensors"}[how]
        path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("how", ["has no state", "has no adapter", "state", "weights"])
def test_last_is_the_newest_finished_checkpoint(
    how: str, run: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "checkpoint-2", how)
    options = ["--max_steps", "3", "--save_steps", "5", "--export", "--resume_from_checkpoint", "last"]
    assert main(["train", *places(model_folder, data_folder, run), *QUICK, *options]) == 0
    shown = capsys.readouterr()
    assert f"note: {run / 'checkpoint-2'} is not finished, " in shown.err
    assert [line.split()[1] for line in shown.out.splitlines() if line.startswith("step ")] == ["2/3", "3/3"]
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_newest_by_number_and_none_finished(run: Path) -> None:
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-10")
    assert checkpoint_to_resume("last", str(run)) == (str(run / "checkpoint-10"), [])
    assert checkpoint_to_resume("false", str(run)) == (None, [])
    for folder in run.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"there is no finished checkpoint in .* \(.*it has no trainer_state.json"):
        checkpoint_to_resume("last", str(run))
    with pytest.raises(UserError, match=r"is no finished checkpoint of a trainer: it has no trainer_state\.json"):
        checkpoint_to_resume(str(run / "checkpoint-1"), str(run))


@pytest.mark.parametrize("state", ["[1]", "{}", "{", '{"global_step": "x"}'])
def test_a_damaged_state_is_named(state: str, run: Path) -> None:
    (run / "checkpoint-1" / "trainer_state.json").write_text(state)
    assert what_is_missing(run / "checkpoint-1") == "its trainer_state.json is damaged"


def test_checkpoints_of_sharded_models_have_no_adapter_file(run: Path) -> None:
    (run / "checkpoint-1" / "shadow_config.json").unlink()
    (run / "checkpoint-1" / "pytorch_model_fsdp_0").mkdir()
    assert what_is_missing(run / "checkpoint-1") is None


def test_another_adapter_does_not_resume(
    run: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = [*places(model_folder, data_folder, run), *QUICK, "--export", "--resume_from_checkpoint", "last"]
    said = refused(capsys, *resumed, "--max_steps", "4", "--variant", "published")
    assert "the training does not start: " in said


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_before_a_checkpoint(
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(self: TrainingProgress, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "on_step_end", interrupt)
    assert main(["train", *places(model_folder, data_folder, tmp_path / "out"), *QUICK, "--max_steps", "9"]) == 130
    said = capsys.readouterr().err
    assert said.startswith("shadow-peft train: interrupted after step 1 of 9, before the first checkpoint")
    assert len(said.splitlines()) == 1


def test_ctrl_c_says_how_to_resume(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "an out"
    options = ["--max_steps", "4000", "--save_steps", "2", "--save_total_limit", "2", "--overwrite"]
    command = [sys.executable, "-m", "shadow_peft.cli", "train", *places(model_folder, data_folder, out), *QUICK, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("step 6/") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    *others, line = said.splitlines()  # transformers remarks that its checkpoints are of the same second
    assert all("mtime" in other for other in others)
    assert line.startswith("shadow-peft train: interrupted after step ")
    program, verb, *resumed = shlex.split(line.partition("resume with: ")[2])
    assert (program, verb) == ("shadow-peft", "train")
    assert "--overwrite" not in resumed
    last, _ = checkpoint_to_resume("last", str(out))
    steps = int(str(last).rpartition("-")[2])
    assert main(["train", *resumed, "--max_steps", str(steps + 1)]) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == steps + 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft
def test_an_adapter_of_others_is_never_removed(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    get_peft_model(llama(), LoraConfig(target_modules="all-linear")).save_pretrained(out)
    before = files(out)
    assert main(["train", *places(model_folder, data_folder, out), *QUICK, "--overwrite"]) == 1
    assert files(out) == before
