"""The detached shadow of a demo run in every runtime, beside transformers.

    python -m benchmarks.runtimes shadow-demo

The folder is the one that `shadow-peft demo` wrote, with `adapter/` in it. The shadow is folded and exported to every format
of the table. Every command of the test split is answered greedily, one at a time, on one thread, and compared with the
answer of transformers in float32. For the speed both answer the same blocks of commands in turn, and the ratio is the median
over the blocks, so that other load on the machine falls on both. `docs/runtimes.md` shows the table of the results.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.devices import installed
from shadow_peft.checkpoint import reading
from shadow_peft.demo.embedded import BASE_PATH, load_base, load_tokenizer
from shadow_peft.demo.robot_commands import Command, commands
from shadow_peft.export.check import Answer, ends_of, generates
from shadow_peft.export.runtimes import Settings, Source, cannot_run, runtime
from shadow_peft.tasks.causal_lm import ShadowForCausalLM

RESULTS = Path(__file__).parent / "results" / "runtimes.json"
TOKENS = 64
BLOCKS, BLOCK = 5, 6
"""Blocks of commands that runtime and transformers answer in turn, and commands in one."""

Format: TypeAlias = tuple[str, str, Settings]
"""(name of the row, format of the export, its settings)."""

FORMATS: list[Format] = [
    ("llama.cpp, f32", "gguf", Settings(type="f32")),
    ("llama.cpp, f16", "gguf", Settings(type="f16")),
    ("llama.cpp, bf16", "gguf", Settings(type="bf16")),
    ("llama.cpp, q8_0", "gguf", Settings(type="q8_0")),
    ("llama.cpp, q4_k_m", "gguf", Settings(type="q4_k_m")),
    ("onnxruntime", "onnx", Settings()),
    ("OpenVINO", "openvino", Settings()),
    ("ExecuTorch", "executorch", Settings()),
    ("page in Chromium", "html", Settings()),
]
PACKAGES = ("torch", "transformers", "xllamacpp", "onnxruntime", "openvino", "executorch")


@dataclass(frozen=True)
class Row:
    """One runtime.

    Attributes:
        name: of runtime and type.
        megabytes: of everything that was written, 10^6 bytes.
        ratio: tokens per second, in units of those of transformers beside it.
        exact: share of commands whose whole answer is right, in [0, 1].
        same: commands with the answer of transformers.
    """

    name: str
    megabytes: float
    ratio: float
    exact: float
    same: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a demo run")
    parser.add_argument("--base", type=Path, default=BASE_PATH, help="folder of its base")
    parser.add_argument("--commands", type=int, default=300, help="commands of the test split")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in FORMATS], help="Measure these rows again.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    formats = [one for one in FORMATS if settings.only is None or one[0] in settings.only]
    results = measure(settings.run, settings.base, commands("test", settings.commands), formats)
    if settings.only is not None:
        results = merged(json.loads(settings.output.read_text(encoding="utf-8")), results)
    settings.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def measure(run: Path, base: Path, asked: list[Command], formats: Sequence[Format] = FORMATS) -> dict[str, Any]:
    """The rows of some formats behind that of transformers, with versions and machine."""
    tokenizer = load_tokenizer(base)
    model = ShadowForCausalLM.from_pretrained(load_base(base), str(run / "adapter")).export_shadow(fold=True).eval()
    prompts = [list(tokenizer(command.prompt)["input_ids"]) for command in asked]
    with tempfile.TemporaryDirectory() as name:
        source = Source(model, tokenizer, Path(name))
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        size = sum(path.stat().st_size for path in Path(name).iterdir())
        expected = [generates(model)(prompt, TOKENS) for prompt in prompts]
        first = Row("transformers", size / 1e6, 1.0, _exact(expected, asked, tokenizer), len(asked))
        rows = [first, *_rows(formats, source, prompts, expected, asked)]
    return {
        "rows": [asdict(row) for row in rows],
        "commands": len(asked),
        "parameters": model.num_parameters(),
        "variant": reading.read(str(run / "adapter")).config.variant,
        "versions": {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}},
        "machine": platform.processor() or platform.machine(),
    }


def merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Results with the rows that were measured again in the place of those before.

    Raises:
        ValueError: they are of another shadow or of other commands.
    """
    first, again = before["rows"][0], after["rows"][0]
    is_same = first["exact"] == again["exact"]
    if not is_same or any(before[name] != after[name] for name in ("commands", "parameters", "variant")):
        raise ValueError("The rows that are there are of another shadow, or of other commands: measure all of them.")
    rows = {row["name"]: row for row in (*before["rows"], *after["rows"][1:])}
    order = [first["name"], *(name for name, *_ in FORMATS)]
    versions = {**before["versions"], **{name: one for name, one in after["versions"].items() if one != "none"}}
    return {**before, "rows": [rows[name] for name in order if name in rows], "versions": versions}


def _rows(
    formats: Sequence[Format], source: Source, prompts: list[list[int]], expected: list[list[int]], asked: list[Command]
) -> Iterator[Row]:
    for name, to, settings in formats:
        reason = cannot_run(to)
        if reason is not None:
            raise SystemExit(f"{name} is not measured: {reason}")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder)
            runtime(to).convert(source, target, settings)
            size = sum(path.stat().st_size for path in target.iterdir())
            with runtime(to).running(target) as run:
                ratio = side_by_side(generates(source.model), run.answer, prompts)
                seen = [run.answer(prompt, TOKENS) for prompt in prompts]
        ends = ends_of(source.model)
        same = sum(_without(ends, a) == _without(ends, b) for a, b in zip(seen, expected, strict=True))
        row = Row(name, size / 1e6, ratio, _exact(seen, asked, source.tokenizer), same)
        print(row, flush=True)
        yield row


def side_by_side(reference: Answer, other: Answer, prompts: list[list[int]]) -> float:
    """Tokens per second of `other` in units of those of `reference`: the median over blocks that they answer in turn."""
    for answer in (reference, other):
        answer(prompts[0], TOKENS)
    ratios = []
    for start in range(0, BLOCKS * BLOCK, BLOCK):
        block = prompts[start : start + BLOCK]
        ratios.append(_rate(other, block) / _rate(reference, block))
    return median(ratios)


def _rate(answer: Answer, prompts: list[list[int]]) -> float:
    begun = time.perf_counter()
    tokens = sum(len(answer(prompt, TOKENS)) for prompt in prompts)
    return tokens / (time.perf_counter() - begun)


def _exact(answers: list[list[int]], asked: list[Command], tokenizer: PreTrainedTokenizerBase) -> float:
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    return sum(text == command.completion for text, command in zip(texts, asked, strict=True)) / len(asked)


def _without(ends: set[int], answer: list[int]) -> list[int]:
    return [token for token in answer if token not in ends]


def table(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    lines = [
        "| | size, MB | tokens/s, ratio to transformers | exact match | answers as transformers |",
        "|---|---|---|---|---|",
    ]
    for row in (Row(**row) for row in results["rows"]):
        agreed = f"{row.same} of {results['commands']}"
        lines.append(f"| {row.name} | {row.megabytes:.1f} | {row.ratio:.2f} | {row.exact:.1%} | {agreed} |")
    measured = {row["name"] for row in results["rows"]}
    lines += [f"| {name} | not measured | | | |" for name, *_ in FORMATS if name not in measured]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
