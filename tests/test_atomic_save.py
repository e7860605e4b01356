"""A save happens all or none: wherever it is stopped, the old checkpoint or the new one is there, never a mixture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shadow_peft import ShadowConfig, ShadowForCausalLM
from shadow_peft.checkpoint import reading, store
from shadow_peft.storage import atomic
from tests.tiny_models import causal_lm, llama, tokens

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("how", "old", "new", "least"), [("kill", "published", "readout", 60), ("raise", "peft", "published", 50)]
)
def test_a_save_stopped_anywhere_leaves_the_old_or_the_new(how: str, old: str, new: str, least: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kill_points", how, str(tmp_path), old, new, "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout)
    assert len(outcomes) >= least
    assert set(outcomes) == {"old", "new"}
    assert outcomes == sorted(outcomes, reverse=True), "old before the one rename and new behind it"


def stop_after_commit(monkeypatch: pytest.MonkeyPatch, save: Callable[[], None]) -> None:
    """What a kill right after the rename leaves."""

    class Killed(BaseException):
        pass

    def stop(directory: Path) -> None:
        if (directory / atomic.SAVED).exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "finish_save", stop)
        patch.setattr(atomic, "_take_back", lambda directory: None)
        with pytest.raises(Killed):
            save()


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError("not supported here")


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    causal_lm(llama(), variant="published", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = causal_lm(llama(), seed=5, variant="readout")
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == {"shadow_config.json", "shadow_adapter_readout.safetensors"}
    assert torch.equal(ShadowForCausalLM.from_pretrained(llama(), tmp_path)(tokens()).logits, model(tokens()).logits)


def test_readers_need_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = causal_lm(llama(), variant="published"), causal_lm(llama(), seed=5, variant="readout")
    old.save_pretrained(tmp_path)
    stop_after_commit(monkeypatch, lambda: new.save_pretrained(tmp_path))
    assert (tmp_path / "shadow_adapter.safetensors").exists()
    for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    assert ShadowConfig.from_pretrained(tmp_path).variant == "readout"
    assert torch.equal(ShadowForCausalLM.from_pretrained(llama(), tmp_path)(tokens()).logits, new(tokens()).logits)


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("any new file")
    causal_lm(llama()).save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_save_ends_an_earlier_one_and_deletes_its_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    causal_lm(llama(), variant="published", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    stop_after_commit(monkeypatch, lambda: causal_lm(llama(), variant="readout").save_pretrained(tmp_path))
    (tmp_path / ".saving-0123").mkdir()
    (tmp_path / ".saving-0123" / "shadow_config.json").write_text("half of a")
    causal_lm(llama(), variant="peft").save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}


def test_a_reader_starts_again_when_a_save_comes_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = causal_lm(llama(), variant="published"), causal_lm(llama(), seed=5, variant="published")
    old.save_pretrained(tmp_path)
    original, calls = reading.read_tensors, []

    def reads_late(path: Path) -> dict[str, torch.Tensor]:
        if not calls:
            new.save_pretrained(tmp_path)
        calls.append(path)
        return original(path)

    monkeypatch.setattr(reading, "read_tensors", reads_late)
    stored = reading.read(tmp_path)
    assert len(calls) == 2
    assert all(torch.equal(stored.tensors[name], tensor) for name, tensor in new.state_dict().items())


@pytest.mark.parametrize("listed", ["../outside", "/etc/passwd", "..", "", "a\\b", 3])
def test_a_manifest_names_files_of_its_folder_only(listed: object, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    causal_lm(llama()).save_pretrained(folder)
    (tmp_path / "outside").write_text("stays")
    (folder / ".saved").mkdir()
    (folder / ".saved" / "manifest.json").write_text(json.dumps({"written": [], "removed": [listed]}))
    for act in (lambda: reading.read(folder), lambda: causal_lm(llama()).save_pretrained(folder)):
        with pytest.raises(ValueError, match=r"Move .*\.saved away"):
            act()
    assert (tmp_path / "outside").exists()


def test_an_exception_in_a_new_folder_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "write_json", refuse)
    with pytest.raises(OSError, match="not supported"):
        causal_lm(llama()).save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())
