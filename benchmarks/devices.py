"""Clock and memory of the device that is measured: processor time and resident memory, or a GPU's own."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PACKAGES = ("torch", "transformers", "peft", "shadow-peft")


def seconds(device: str) -> float:
    """Seconds up to now: of this process at work on a CPU, of the clock on a GPU, whose queue is finished first."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device: str) -> float:
    """Forget the peak of memory so far; the present size in MB."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return resident("VmRSS")
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def peak(device: str) -> float:
    """MB at most since the peak was forgotten."""
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


def resident(field: str) -> float:
    """MB of this process's memory: now (VmRSS), or at most since the last reset (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


def most_allocated(work: Callable[[], object], device: str) -> int:
    """Bytes of all tensors that some work makes, at the moment when they are most; what lay there before is left out.

    On a CPU the profiler counts allocations, so that neither fragmentation nor what the C library keeps for later counts.
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where figures were measured, and with what."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": device,
    }
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpu_memory_mb": gpu.total_memory // 2**20, "cuda": torch.version.cuda}
    return {**facts, **{name: installed(name) for name in PACKAGES}}


def installed(package: str) -> str:
    """The version of a package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
