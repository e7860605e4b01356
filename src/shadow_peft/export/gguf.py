"""GGUF, for llama.cpp and what is built on it.

llama.cpp's own converter writes the file. It comes with the sources of `llama-cpp-python`, which are fetched once and not
built, and it runs in a process of its own. `xllamacpp`, llama.cpp's server in a wheel, runs the file. It has no quantizer
that can be called: the one for q4_k_m is in another build of llama.cpp, which is fetched from npm.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shadow_peft.export.fetched import Package, fetch
from shadow_peft.export.runtimes import CannotExport, Running, Settings, Source

LLAMA_CPP = "vendor/llama.cpp"
SOURCES = Package(
    registry="pip",
    name="llama-cpp-python",
    version="0.3.36",
    integrity="sha256-gy2waZAH8b6Vp+Qe8S6IkmsCuoNkYeNqNjctsnYMGi4=",
    files=tuple(f"{LLAMA_CPP}/{name}" for name in ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")),
)

LIBRARY = Package(
    registry="npm",
    name="@node-llama-cpp/linux-x64",
    version="3.22.1",
    integrity="sha512-5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==",
    files=("bins/linux-x64/libggml", "bins/linux-x64/libllama.v"),
)
"""llama.cpp as a shared library, built for Node; its quantizer is used."""

USAGE = """```bash
llama-cli -m {file}
```

or any other program that is built on llama.cpp."""

_CONTEXT = 4096
"""Most tokens of prompt and answer when a file is run to be checked."""

_Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M of llama.h


def convert(source: Source, target: Path, settings: Settings) -> None:
    """Write `model-TYPE.gguf`.

    Raises:
        CannotExport: llama.cpp has no such architecture or tokenizer, or cannot be fetched.
    """
    file = target / f"model-{settings.type}.gguf"
    if settings.type != "q4_k_m":
        _run_converter(source.folder, file, settings.type)
        return
    full = source.folder / "model-f32.gguf"
    _run_converter(source.folder, full, "f32")
    _quantize(full, file)
    full.unlink()


@contextmanager
def running(target: Path) -> Iterator[Running]:
    """llama.cpp's server in this process, on as many threads as torch has."""
    file = next(target.glob("*.gguf"))
    with serving(file) as post:

        def answer(prompt: list[int], tokens: int) -> list[int]:
            return list(post("/completion", {"prompt": prompt, "n_predict": tokens, **GREEDY})["tokens"])

        def split(text: str) -> list[int]:
            asked = {"content": text, "add_special": False, "parse_special": True}
            return list(post("/tokenize", asked)["tokens"])

        yield Running(answer, split)


GREEDY = {"temperature": 0.0, "return_tokens": True, "cache_prompt": False}
"""What a request to `/completion` says beside prompt and length."""


@contextmanager
def serving(file: Path, draft: Path | None = None) -> Iterator[Any]:
    """A function (path, request) -> response of llama.cpp's server for a file.

    Args:
        file: the GGUF.
        draft: GGUF of a model that drafts for it, with the same vocabulary; the answers stay the same.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = _CONTEXT, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if "f32" in file.stem:  # the cache is otherwise of float16
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if draft is not None:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = str(draft)
    server = xllamacpp.Server(params)

    def post(path: str, request: dict[str, Any]) -> Any:
        sent = urllib.request.Request(
            server.listening_address + path, json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(sent) as response:
            return json.load(response)

    yield post


def pre_tokenizer(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer, where it provably is that one; None otherwise.

    llama.cpp tells known tokenizers by a hash over their vocabulary, so a tokenizer that was trained anew is unknown to it
    even when it cuts text in a way that llama.cpp has.

    Args:
        tokenizer: content of `tokenizer.json`.
    """
    model = tokenizer["model"]
    plain = {"dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"}
    if model["type"] != "BPE" or any(model.get(name) for name in plain) or tokenizer.get("normalizer"):
        return None
    split = tokenizer.get("pre_tokenizer") or {}
    parts = split.get("pretokenizers", [split])
    if not parts or parts[-1] not in _BYTE_LEVEL:
        return None
    return next((name for before, name in _BEFORE if parts[:-1] == before), None)


_BYTE_LEVEL = [
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim, "use_regex": True} for trim in (True, False)
]
_BEFORE: list[tuple[list[dict[str, Any]], str]] = [
    ([], "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}], "smollm"),
]


def _run_converter(folder: Path, file: Path, outtype: str) -> None:
    tokenizer = folder / "tokenizer.json"
    name = pre_tokenizer(json.loads(tokenizer.read_text(encoding="utf-8"))) if tokenizer.is_file() else None
    sources = next(fetch(SOURCES).glob(f"*/{LLAMA_CPP}"))
    program = Path(__file__).with_name("convert_to_gguf.py")
    with tempfile.TemporaryDirectory() as work:
        reason = Path(work, "reason")
        words = (program, sources, name or "", folder, file, outtype, reason)
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_LOCAL_GGUF": "1"})
        if done.returncode:
            said = reason.read_text(encoding="utf-8") if reason.is_file() else f"nothing, it ended with {done.returncode}"
            raise CannotExport(f"llama.cpp's converter says: {said}")


def _quantize(full: Path, file: Path) -> None:
    """Write a float32 file again as q4_k_m."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise CannotExport(
            "--type q4_k_m is written on Linux with x86-64 alone; elsewhere run llama.cpp's own quantizer on --type f32"
        )
    library = next(fetch(LIBRARY).glob("*/bins/*/libllama.*"))
    program = Path(__file__).with_name("quantize_gguf.py")
    words = (program, library, full, file, _Q4_K_M, torch.get_num_threads())
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise CannotExport(f"llama.cpp cannot write this model as q4_k_m: {said[-1] if said else 'it does not say why'}")
