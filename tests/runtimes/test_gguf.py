"""GGUF: llama.cpp answers as transformers does, and a tokenizer that it has not is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from shadow_peft.export import gguf
from shadow_peft.export.check import agreement, generates
from shadow_peft.export.fetched import is_fetched
from shadow_peft.export.runtimes import CannotExport, Settings, Source
from tests.cli.conftest import tiny_tokenizer
from tests.runtimes.conftest import TEXTS, digits_tokenizer, tiny_source
from tests.runtimes.needs import need

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def named(pre_tokenizer: Any = None, normalizer: Any = None) -> str | None:
    backend = tiny_tokenizer().backend_tokenizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    return gguf.pre_tokenizer(json.loads(backend.to_str()))


def test_pre_tokenizers_that_llama_cpp_provably_has() -> None:
    assert named() == "gpt-2"
    assert named(pre_tokenizers.Sequence([BYTES])) == "gpt-2"
    assert named(pre_tokenizers.Sequence([DIGITS, BYTES])) == "smollm"


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES]),
        pre_tokenizers.Sequence([BYTES, DIGITS]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), BYTES]),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Sequence([]),
    ],
)
def test_others_have_no_name(pre_tokenizer: Any) -> None:
    assert named(pre_tokenizer) is None


def test_a_normalizer_or_another_model_has_no_name() -> None:
    assert named(normalizer=normalizers.NFC()) is None
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for change in ({"type": "Unigram"}, {"byte_fallback": True}, {"ignore_merges": True}):
        assert gguf.pre_tokenizer({**content, "model": {**content["model"], **change}}) is None


def test_llama_cpp_answers_as_transformers(source: Source, prompts: list[list[int]], tmp_path: Path) -> None:
    need("gguf")
    gguf.convert(source, tmp_path, Settings(type="f32"))
    assert [path.name for path in tmp_path.iterdir()] == ["model-f32.gguf"]
    with gguf.running(tmp_path) as run:
        assert agreement(generates(source.model), run.answer, prompts, 12, {1}).same == len(prompts)
        assert run.tokens is not None
        assert [run.tokens(text) for text in TEXTS] == prompts


def test_types_have_their_size(source: Source, tmp_path: Path) -> None:
    need("gguf")
    sizes = {}
    for name in ("f32", "q8_0"):
        gguf.convert(source, tmp_path, Settings(type=name))
        sizes[name] = (tmp_path / f"model-{name}.gguf").stat().st_size
    weights = sum(parameter.numel() for parameter in source.model.parameters() if parameter.dim() > 1)
    saved = sizes["f32"] - sizes["q8_0"]
    assert abs(saved - weights * (4 - 34 / 32)) < 0.02 * sizes["f32"]  # blocks of 32 have one scale of 2 bytes


def test_q4_k_m_stores_4_bits_where_rows_have_256_weights(tmp_path: Path) -> None:
    """Blocks of 256 weights take 144 bytes as q4_k, 210 as q6_k; the type takes both."""
    need("gguf")
    if not is_fetched(gguf.LIBRARY):
        pytest.skip(f"{gguf.LIBRARY.name} not fetched: python -m shadow_peft.export.fetch_all")
    source = tiny_source(tmp_path, hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    (tmp_path / "gguf").mkdir()
    gguf.convert(source, tmp_path / "gguf", Settings(type="q4_k_m"))
    (file,) = (tmp_path / "gguf").iterdir()
    weights = sum(parameter.numel() for parameter in source.model.parameters() if parameter.dim() > 1)
    header = 40_000  # names, settings and tokens
    assert 144 / 256 < file.stat().st_size / weights < (210 / 256) + header / weights
    with gguf.running(tmp_path / "gguf") as run:
        assert len(run.answer([5, 6, 7], 4)) == 4
    assert [path.name for path in tmp_path.glob("*.gguf")] == []


def test_q4_k_m_elsewhere_names_the_way(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_run_converter", lambda *_: None)
    monkeypatch.setattr(gguf.platform, "machine", lambda: "aarch64")
    with pytest.raises(CannotExport, match="q4_k_m is written on Linux with x86-64 alone"):
        gguf.convert(source, tmp_path, Settings(type="q4_k_m"))


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(source: Source, tmp_path: Path) -> None:
    need("gguf")
    tokenizer = digits_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    source.model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    with pytest.raises(CannotExport, match="the way this tokenizer splits text before BPE is none that"):
        gguf.convert(Source(source.model, tokenizer, tmp_path / "hf"), tmp_path, Settings(type="f32"))


CONVERTER = """
import atexit, logging, os, sys
def main():
    atexit.register(lambda: print("W1122 a warning at the end", file=sys.stderr))
    {ends}
"""
"""What stands in for llama.cpp's converter."""


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ("raise KeyError('rope')", "KeyError: 'rope'"),
        (
            "logging.getLogger('hf-to-gguf').error('Model %s is not supported', 'Odd'); sys.exit(1)",
            "Model Odd is not supported",
        ),
        ("sys.exit('two\\nlines')", "two lines"),
        ("sys.exit(1)", "it does not say why"),
        ("os.kill(os.getpid(), 9)", "nothing, it ended with -9"),
    ],
)
def test_the_reason_of_the_converter_is_passed_on(
    ends: str, reason: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever other libraries write on standard error behind it."""
    llama_cpp = tmp_path / "sources" / gguf.LLAMA_CPP
    (llama_cpp / "conversion").mkdir(parents=True)
    (llama_cpp / "convert_hf_to_gguf.py").write_text(CONVERTER.format(ends=ends))
    (llama_cpp / "conversion" / "base.py").write_text("class TextModel:\n    get_vocab_base_pre = None\n")
    monkeypatch.setattr(gguf, "fetch", lambda _: tmp_path)
    with pytest.raises(CannotExport) as error:
        gguf.convert(source, tmp_path, Settings(type="f32"))
    assert str(error.value) == f"llama.cpp's converter says: {reason}"


def test_a_shadow_drafts_for_its_base_in_llama_cpp(source: Source, prompts: list[list[int]], tmp_path: Path) -> None:
    """A model that drafts for itself is right; one of other weights is wrong; the answers are the same."""
    need("gguf")
    files = {}
    for name, seed in (("base", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        gguf.convert(tiny_source(tmp_path / f"{name}-hf", seed), tmp_path / name, Settings(type="f32"))
        files[name] = tmp_path / name / "model-f32.gguf"
    expected = [generates(source.model)(prompt, 12) for prompt in prompts]
    taken = {}
    for name, draft in files.items():
        with gguf.serving(files["base"], draft) as post:
            said = [post("/completion", {"prompt": prompt, "n_predict": 12, **gguf.GREEDY}) for prompt in prompts]
        pairs = zip(said, expected, strict=True)
        assert all([t for t in s["tokens"] if t != 1] == [t for t in e if t != 1] for s, e in pairs)
        drafted = sum(one["timings"].get("draft_n", 0) for one in said)
        assert drafted > 0
        taken[name] = sum(one["timings"].get("draft_n_accepted", 0) for one in said) / drafted
    assert taken["base"] > 0.9
    assert taken["other"] < taken["base"]
