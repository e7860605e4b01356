"""What a training step costs: LoRA, DoRA, both published shadows and ours, on one base and batch, in one run, interleaved.

    OMP_NUM_THREADS=1 python -m benchmarks.training_cost --peer PYTHON [--output results.json]
    ... --compile          the step's forward compiled (ours, LoRA and DoRA only)
    ... --checkpointing    layers computed again in the backward pass
    ... --dtype bfloat16   the base in bfloat16, adapters in float32 (--only LoRA DoRA ours: both published shadows fail)
    ... --shape qwen3-4b --device cuda --dtype bfloat16     a random base of that shape; the published shadows under autocast

PYTHON is the interpreter of an environment with the published packages (`tests/compat/run.py` says which), or the folder of
an unpacked `shadow-peft` 0.1.1. A base of 12 layers, 512 wide, with 8192 tokens; about 3.5M trainable parameters each; 4
rows of 256 tokens, every one a target. Each contender has a process of its own; steps take turns. Columns:

    layers, vocabulary   KB per token kept for the backward pass, by storage, without parameters; storages of tensors with an
                         axis as long as the vocabulary are the vocabulary's
    peak                 MB that the resident memory, or that of the GPU, grows in a step, above what stays between steps
    step, cpu            seconds of forward, backward and AdamW, medians: of the clock, and of this process at work (or of
                         the GPU), which other processes on the machine disturb less
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, logging

from benchmarks import devices
from benchmarks.decoding.run import interpreter, peer_paths
from benchmarks.shapes import SHAPES, Shape

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH, VOCABULARY, LAYERS, WIDTH, MLP = 4, 256, 8192, 12, 512, 1536
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ------------------------------------------------------------------ contenders


def with_lora(base: Any, shape: Shape | None, dora: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    rank = 28 if dora else 29
    sizes: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": LINEAR, "use_dora": dora}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **(shape.lora(dora) if shape else sizes)))


def with_dora(base: Any, shape: Shape | None) -> nn.Module:
    return with_lora(base, shape, dora=True)


def with_peft_shadow(base: Any, shape: Shape | None) -> nn.Module:
    from peft import ShadowConfig, get_peft_model

    sizes = {"r": 16, "update_hidden_size": 10, "shadow_intermediate_size": 1280}
    return get_peft_model(base, ShadowConfig(task_type="CAUSAL_LM", **(shape.tuner() if shape else sizes)))


def with_shadow(base: Any, **config: Any) -> nn.Module:
    """The published package and ours have one interface."""
    from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

    return ShadowForCausalLM(get_shadow_model(base, ShadowConfig(**config)))


def with_published(base: Any, shape: Shape | None) -> nn.Module:
    return with_shadow(base, **(shape.published() if shape else {"shadow_intermediate_size": 1344}))


def with_ours(base: Any, shape: Shape | None) -> nn.Module:
    """As large, with more of it between the layers."""
    sizes = {"shadow_intermediate_size": 640, "injection_hidden_size": 85, "output_hidden_size": 42}
    return with_shadow(base, **(shape.readout() if shape else {"variant": "readout", **sizes}))


PUBLISHED = "shadow-peft 0.1.1"
CONTENDERS = {
    "LoRA": with_lora,
    "DoRA": with_dora,
    "peft's Shadow": with_peft_shadow,
    PUBLISHED: with_published,
    "ours": with_ours,
}
AUTOCAST = ("peft's Shadow", PUBLISHED)
"""Who does not mix dtypes, and runs under autocast at the shapes of large models."""


# ------------------------------------------------------------------ one contender, in a process of its own


def build(name: str, options: argparse.Namespace) -> nn.Module:
    base = make_base(options)
    torch.manual_seed(0)
    model = CONTENDERS[name](base, SHAPES.get(options.shape)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if name in ("LoRA", "DoRA", "peft's Shadow"):
            base.enable_input_require_grads()
    return model


def make_base(options: argparse.Namespace) -> Any:
    if options.shape:
        base = SHAPES[options.shape].random_base(options.device, options.dtype)
        base.config.use_cache = False
        return base
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": MLP, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=VOCABULARY, pad_token_id=0, use_cache=False)
    return LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(options: argparse.Namespace) -> Tensor:
    size = (options.rows, options.length)
    return torch.randint(3, vocabulary(options), size, generator=torch.Generator().manual_seed(0)).to(options.device)


def vocabulary(options: argparse.Namespace) -> int:
    return SHAPES[options.shape].vocabulary if options.shape else VOCABULARY


class WeightSlice:
    """Storages that a forward keeps for its backward pass, with the shapes of their tensors."""

    def __init__(self, model: nn.Module, ids: Tensor, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        others = [*model.parameters(), *model.buffers(), ids]
        self.others = {t.untyped_storage().data_ptr() for t in others}
        self.bytes: dict[int, int] = {}
        self.of_vocabulary: set[int] = set()
        self.shapes: dict[int, tuple[int, ...]] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key and key not in self.others and storage.nbytes():
            self.bytes[key] = storage.nbytes()
            self.shapes.setdefault(key, tuple(tensor.shape))
            if self.vocabulary in tensor.shape:
                self.of_vocabulary.add(key)
        return tensor


def tensors() -> list[Tensor]:
    """Every tensor that Python knows of."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def kept(model: nn.Module, ids: Tensor, vocabulary: int, loss_of: Callable[[Any, Tensor], Tensor]) -> dict[str, float]:
    """KB per token."""
    notes = WeightSlice(model, ids, vocabulary)
    before = {id(tensor) for tensor in tensors()}
    with torch.autograd.graph.saved_tensors_hooks(notes.note, lambda tensor: tensor):
        loss = loss_of(model, ids)
    gc.collect()
    for thing in tensors():  # what is put aside by other ways, such as gradients that are ready
        if id(thing) not in before and thing is not loss:
            notes.note(thing)
    if os.environ.get("KEPT_SHAPES"):
        print(*sorted((v, notes.shapes[k]) for k, v in notes.bytes.items()), sep="\n", file=sys.stderr)
    of_vocabulary = sum(notes.bytes[key] for key in notes.of_vocabulary)
    return {
        "layers": (sum(notes.bytes.values()) - of_vocabulary) / ids.numel() / 1024,
        "vocabulary": of_vocabulary / ids.numel() / 1024,
    }


def worker(options: argparse.Namespace) -> None:
    """Answers lines on the standard input: what is kept, the peak of a step, or the seconds of a step."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, ids = build(options.worker, options), batch(options)
    mixed = bool(options.shape) and options.worker in AUTOCAST and options.dtype != "float32"

    def loss_of(model: Any, ids: Tensor) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=mixed):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss

    optimizer = torch.optim.AdamW(trained(model), lr=1e-4)
    forward = torch.compile(model) if options.compile else model

    def step() -> tuple[float, float]:
        started = time.perf_counter(), devices.seconds(options.device)
        loss_of(forward, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken = devices.seconds(options.device) - started[1]  # waits for a GPU
        return time.perf_counter() - started[0], taken

    for line in sys.stdin:
        answer: Any
        if line.strip() == "kept":
            answer = {"trainable": sum(p.numel() for p in trained(model))}
            answer |= kept(model, ids, vocabulary(options), loss_of)
        elif line.strip() == "peak":
            step()
            gc.collect()
            before = devices.reset_peak(options.device)
            step()
            answer = devices.peak(options.device) - before
        else:
            answer = step()
        print(json.dumps(answer), flush=True)


# ------------------------------------------------------------------ all of them


class Process:
    """A contender at work."""

    def __init__(self, name: str, options: argparse.Namespace, **environment: str) -> None:
        python = interpreter(options.peer) if name == PUBLISHED else sys.executable
        surroundings = {**os.environ, **environment}
        if name == PUBLISHED:
            surroundings["PYTHONPATH"] = ":".join(map(str, peer_paths(options.peer)))
        flags = [f"--{flag}" for flag in ("compile", "checkpointing") if getattr(options, flag)]
        flags += ["--shape", options.shape] if options.shape else []
        flags += ["--device", options.device, "--rows", str(options.rows), "--length", str(options.length)]
        command = [python, "-m", "benchmarks.training_cost", "--worker", name, "--dtype", options.dtype, *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings, cwd=ROOT
        )

    def ask(self, question: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def memory(name: str, options: argparse.Namespace) -> dict[str, float]:
    """What is kept, and the peak; freed memory goes back at once, so that the resident size says what is in use."""
    process = Process(name, options, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    answer = {} if options.compile else process.ask("kept")
    answer["peak"] = process.ask("peak")
    process.end()
    return answer


def times(names: list[str], options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Median seconds of a step, of clock and processor, the contenders taking turns."""
    processes = {name: Process(name, options) for name in names}
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(options.steps + 2):
        for name, process in processes.items():
            took = process.ask("step")
            if turn >= 2:
                seconds[name].append(took)
    for process in processes.values():
        process.end()
    return {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in seconds.items()}


def main(options: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in CONTENDERS if options.peer or name != PUBLISHED]
    if options.only:
        names = [name for name in names if name in options.only]
    rows = {name: memory(name, options) for name in names}
    for name, seconds in times(names, options).items():
        rows[name]["step"], rows[name]["cpu"] = seconds
    first = rows[names[0]]
    for row in rows.values():
        row["ratios"] = {column: round(row[column] / first[column], 3) for column in row if column != "ratios"}
    return {
        "command": "python -m benchmarks.training_cost " + " ".join(sys.argv[1:]),
        "ratios are to": names[0],
        "rows": rows,
        "base": {**asdict(SHAPES[options.shape]), "dtype": options.dtype}
        if options.shape
        else {"layers": LAYERS, "width": WIDTH, "mlp": MLP, "vocabulary": VOCABULARY, "dtype": options.dtype},
        "batch": [options.rows, options.length],
        "machine": {**devices.machine(options.device), "threads": os.environ.get("OMP_NUM_THREADS")},
    }


def table(results: dict[str, Any]) -> str:
    columns = {
        "trainable": "{:,.0f}",
        "layers": "{:.0f}",
        "vocabulary": "{:.0f}",
        "peak": "{:.0f}",
        "step": "{:.2f}",
        "cpu": "{:.2f}",
    }
    lines = [f"{'':<18}" + "".join(f"{column:>22}" for column in columns)]
    for name, row in results["rows"].items():
        cells = (f"{shape.format(row[c])} ({row['ratios'][c]:.2f})" if c in row else "-" for c, shape in columns.items())
        lines.append(f"{name:<18}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with the published packages")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="these contenders; ratios are to the first")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shape", choices=SHAPES, help="a random base of this shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.worker:
        worker(options)
        sys.exit()
    results = main(options)
    print(table(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
