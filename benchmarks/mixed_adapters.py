"""What a batch costs whose rows belong to different adapters, against a pass for each adapter and against LoRA's own mixing.

    OMP_NUM_THREADS=1 python benchmarks/mixed_adapters.py [--output benchmarks/results/mixed_adapters.json]

A random base of 12 layers, 512 wide, with 8192 tokens, in float32; 32 rows, in an order that shuffles the adapters; 1, 2,
4, 8 and 32 adapters with as many rows each. Contenders: our variants "published" (r 16, k 10) and "readout" (r 64) with
their default settings and a backbone of one layer with an MLP of 256, and LoRA of peft (r 16, all linear layers) with its
own `adapter_names`. Two kinds of work:

    decode     one cached step of one token for each row, behind 16 tokens
    prefill    one pass over 16 tokens of each row, logits of the last token alone (1, 8 and 32 adapters)

Ways, which take turns, so that other work on the machine disturbs all alike:

    mixed      all rows in one pass, `adapter_names` with one name a row
    separate   a pass for each adapter over its own rows; LoRA is switched with `set_adapter`, whose time does not count
    base       all rows through the bare base, the floor

Seconds are medians of this process's own time at work, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, logging

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

ROWS, CACHED, VOCABULARY, LAYERS, WIDTH, MLP = 32, 16, 8192, 12, 512, 1536
COUNTS = {"decode": (1, 2, 4, 8, 32), "prefill": (1, 8, 32)}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Work = Callable[[], Any]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": MLP, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=VOCABULARY, pad_token_id=0)).eval()


def with_shadows(count: int, variant: str) -> ShadowForCausalLM:
    config = ShadowConfig(variant=variant, shadow_intermediate_size=256, shadow_init="random")
    model = ShadowForCausalLM(get_shadow_model(base(), config, adapter_name="a0"))
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    return model.eval()


def with_loras(count: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEAR, init_lora_weights=False)
    model = get_peft_model(base(), config, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    return model.eval()


CONTENDERS: dict[str, Callable[[int], Any]] = {
    "published": lambda count: with_shadows(count, "published"),
    "readout": lambda count: with_shadows(count, "readout"),
    "LoRA": with_loras,
}


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def cache_of(model: Any, rows: int, **names: Any) -> Any:
    return model(input_ids=tokens(rows, CACHED), use_cache=True, logits_to_keep=1, **names).past_key_values


def step(model: Any, rows: int, cache: Any, kind: str, **names: Any) -> None:
    """One call; a cache is cropped back afterwards."""
    quiet = {"output_shadow_logits": False} if isinstance(model, ShadowForCausalLM) else {}
    if kind == "prefill":
        model(input_ids=tokens(rows, CACHED), use_cache=False, logits_to_keep=1, **names, **quiet)
    else:
        model(input_ids=tokens(rows, 1), past_key_values=cache, use_cache=True, **names, **quiet)
        cache.crop(-1)


def seconds_of(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Case:
    """One contender with a number of adapters: its ways, as functions that return seconds."""

    def __init__(self, contender: str, count: int, kind: str) -> None:
        self.model, self.count, self.kind = CONTENDERS[contender](count), count, kind
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
        self.names = [f"a{i % count}" for i in order]
        self.caches: dict[str, Any] = {}
        if kind == "decode":
            self.caches["mixed"] = cache_of(self.model, ROWS, adapter_names=self.names)
            for i in range(count):
                self.model.set_adapter(f"a{i}")
                self.caches[f"a{i}"] = cache_of(self.model, ROWS // count)
            with self.model.disable_adapter():
                self.caches["base"] = cache_of(self.model, ROWS)

    def mixed(self) -> float:
        return seconds_of(lambda: step(self.model, ROWS, self.caches.get("mixed"), self.kind, adapter_names=self.names))

    def separate(self) -> float:
        total = 0.0
        for i in range(self.count):
            self.model.set_adapter(f"a{i}")
            total += seconds_of(lambda i=i: step(self.model, ROWS // self.count, self.caches.get(f"a{i}"), self.kind))
        return total

    def base(self) -> float:
        with self.model.disable_adapter():
            return seconds_of(lambda: step(self.model, ROWS, self.caches.get("base"), self.kind))


@torch.no_grad()
def measure(contender: str, count: int, kind: str, repeats: int) -> dict[str, float]:
    """Median seconds of each way, the ways taking turns."""
    case = Case(contender, count, kind)
    seconds: dict[str, list[float]] = {"mixed": [], "separate": [], "base": []}
    for turn in range(repeats + 1):
        for way, times in seconds.items():
            took = getattr(case, way)()
            if turn:
                times.append(took)
    row = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        **{way: round(value, 5) for way, value in row.items()},
        "mixed to separate": round(row["mixed"] / row["separate"], 3),
        "mixed to base": round(row["mixed"] / row["base"], 3),
    }


def main(options: argparse.Namespace) -> dict[str, Any]:
    repeats = {"decode": options.repeats, "prefill": max(2, options.repeats // 3)}
    rows = {}
    for kind, contender in itertools.product(options.kinds, options.contenders):
        for count in COUNTS[kind]:
            rows[f"{kind}, {contender}, {count}"] = row = measure(contender, count, kind, repeats[kind])
            print(kind, contender, count, row, flush=True)
    return {
        "command": "python benchmarks/mixed_adapters.py",
        "rows": rows,
        "base": {"layers": LAYERS, "width": WIDTH, "mlp": MLP, "vocabulary": VOCABULARY, "dtype": "float32"},
        "batch": {"rows": ROWS, "tokens": CACHED, "repeats": repeats},
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def page_table(results: dict[str, Any]) -> str:
    """The ratios as a table of Markdown, mixed to separate passes and mixed to the bare base."""
    names = {"published": "`published`", "readout": "`readout`", "LoRA": "LoRA (`peft`)"}
    heads = [f"{name}, to {what}" for name in names.values() for what in ("separate", "base")]
    lines = [f"| | adapters | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(heads)]
    for kind, label in (("decode", "decoding"), ("prefill", "prefill")):
        for count in COUNTS[kind]:
            rows = [results["rows"][f"{kind}, {name}, {count}"] for name in names]
            ratios = [f"{row[ratio]:.2f}" for row in rows for ratio in ("mixed to separate", "mixed to base")]
            lines.append(f"| {label} | {count} | {' | '.join(ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--kinds", nargs="*", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--repeats", type=int, default=6, help="timed steps of each way; a third of it for prefill")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    results = main(options)
    if options.kinds == list(COUNTS) and options.contenders == list(CONTENDERS):
        print(page_table(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
