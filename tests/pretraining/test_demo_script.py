"""`scripts/pretrain_demo_shadow.py` on a little text: it reads what the base has read, in the same order, and no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from shadow_peft.demo.embedded import BASE_PATH, load_base, load_shadow, load_tokenizer
from shadow_peft.pretraining.corpus import Corpus, blocks, open_corpus
from tests.pretraining.conftest import documents

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a little text, in folders of its own."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for seed, name in enumerate(("python", "packages", "wordnet", "dialogues", "passages")):
        lines = [json.dumps({"text": t}) for t in documents(300, seed)]
        (corpus / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    places = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "shadow")]
    return ["--corpus", str(corpus), "--invented_characters", "60000", *places]


def test_a_shadow_of_the_demo(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pretrain_demo_shadow
    from pretraining import HELD_OUT_BLOCKS, pack

    shape = ["--num_shadow_layers", "1", "--shadow_intermediate_size", "16"]
    monkeypatch.setattr(pretrain_demo_shadow, "HELD_OUT_BLOCKS", 2)
    monkeypatch.setattr(sys, "argv", ["pretrain_demo_shadow.py", "--max_steps", "2", "--batch", "2", *text, *shape])
    pretrain_demo_shadow.main()
    shadow = load_shadow(tmp_path / "shadow")
    assert (shadow.config.num_hidden_layers, shadow.config.intermediate_size) == (1, 16)
    table = "model.embed_tokens.weight"
    assert load_file(tmp_path / "shadow" / "model.safetensors")[table].equal(load_base().bfloat16().state_dict()[table])
    file = tmp_path / "work" / "documents.jsonl"
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    ours = blocks(open_corpus(Corpus((str(file),), context=256, buffer=1)), load_tokenizer(), 256)
    of_the_base: Dataset = pack(texts, load_tokenizer(), 256)
    assert HELD_OUT_BLOCKS == 128
    assert [row["input_ids"] for row in ours.take(40)] == of_the_base[:40]["input_ids"]


def test_no_more_text_than_the_base_has_read(text: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import pretrain_demo_shadow

    recipe = json.loads((BASE_PATH / "pretraining.json").read_text())["recipe"]
    steps = str(min(recipe["steps"], recipe["stop_at"]) + 1)
    many = ["--max_steps", steps, "--batch", str(recipe["batch"])]
    monkeypatch.setattr(sys, "argv", ["pretrain_demo_shadow.py", *many, *text])
    with pytest.raises(SystemExit, match=r"more than the .* that the base read"):
        pretrain_demo_shadow.main()
