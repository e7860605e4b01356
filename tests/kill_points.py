"""Saves over an old checkpoint and stops at every line of the code that writes; run by `tests.test_atomic_save`.

    python -m tests.kill_points kill|raise FOLDER OLD_VARIANT NEW_VARIANT STRIDE

Every STRIDE-th line is a stop. "kill" ends a forked process with SIGKILL, "raise" raises KeyboardInterrupt. Prints one
line of JSON: what was read after each stop, "old" or "new"; anything else is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from shadow_peft import ShadowForCausalLM
from shadow_peft.checkpoint import reading
from tests.tiny_models import causal_lm, llama, tokens

TRACED = ("storage/atomic.py", "storage/files.py", "storage/tensors.py", "checkpoint/store.py")


def each_line(stop: Callable[[], None], at: int | None = None) -> Callable[..., Any]:
    """A trace function that counts lines of the writing code, in its attribute `lines`, and stops at one of them."""

    def in_frame(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            trace.lines += 1
            if trace.lines - 1 == at:
                stop()
        return in_frame

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return in_frame if frame.f_code.co_filename.endswith(TRACED) else None

    trace.lines = 0
    return trace


def traced(trace: Callable[..., Any], act: Callable[[], None]) -> int:
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return trace.lines


def content(folder: Path) -> str:
    """A hash of all that reading gives."""
    stored, found = reading.read(folder), hashlib.sha256()
    found.update(json.dumps([stored.config.to_dict(), stored.dialect], sort_keys=True).encode())
    for part in (stored.tensors, stored.heads):
        for name in sorted(part):
            found.update(name.encode() + part[name].numpy().tobytes())
    return found.hexdigest()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def save_and_stop(how: str, model: ShadowForCausalLM, folder: Path, at: int) -> None:
    if how == "raise":
        try:
            traced(each_line(interrupt, at), lambda: model.save_pretrained(folder))
        except KeyboardInterrupt:
            return
        raise AssertionError(f"no interrupt came out of line {at}")
    process = os.fork()
    if process == 0:
        traced(each_line(kill, at), lambda: model.save_pretrained(folder))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def main(how: str, root: Path, old_variant: str, new_variant: str, stride: int) -> None:
    torch.set_num_threads(1)
    old = causal_lm(llama(), variant=old_variant, modules_to_save=["lm_head"])
    new, third = (causal_lm(llama(), seed=seed, variant=new_variant) for seed in (5, 6))
    logits = {"old": old(tokens()).logits, "new": new(tokens()).logits}
    old.save_pretrained(root / "checkpoint-1")
    new.save_pretrained(root / "new" / "checkpoint-1")
    expected = {content(root / "checkpoint-1"): "old", content(root / "new" / "checkpoint-1"): "new"}
    names = {word: set(os.listdir(folder / "checkpoint-1")) for word, folder in (("old", root), ("new", root / "new"))}
    shutil.copytree(root / "checkpoint-1", root / "count" / "checkpoint-1")
    lines = traced(each_line(kill), lambda: new.save_pretrained(root / "count" / "checkpoint-1"))

    outcomes = []
    for at in range(0, lines, stride):
        folder = root / str(at) / "checkpoint-1"
        shutil.copytree(root / "checkpoint-1", folder)
        save_and_stop(how, new, folder, at)
        before = sorted(folder.rglob("*"))
        outcomes.append(expected[content(folder)])
        if len(outcomes) % 10 == 1:
            loaded = ShadowForCausalLM.from_pretrained(llama(), folder)
            assert torch.equal(loaded(tokens()).logits, logits[outcomes[-1]]), at
        assert sorted(folder.rglob("*")) == before, "reading changes nothing"
        if how == "raise":
            assert set(os.listdir(folder)) == names[outcomes[-1]], (at, os.listdir(folder))
        third.save_pretrained(folder)
        assert set(os.listdir(folder)) == names["new"], (at, os.listdir(folder))
        assert torch.equal(reading.read(folder).tensors[UPS[new_variant]], third.state_dict()[UPS[new_variant]])
        shutil.rmtree(folder.parent)
    print(json.dumps(outcomes))


UPS = {
    "readout": "shadow_injection_model.injection_ups",
    "published": "shadow_injection_model.injection_ups",
    "peft": "base_model.model.model.layers.0.shadow_up.default.weight",
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]))
