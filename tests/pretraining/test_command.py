"""`shadow-peft pretrain`: what it refuses, what it writes, and that a compiled run computes what a plain one does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadow_peft.cli import main
from tests.pretraining.test_resume import SMALL, arguments
from tests.tiny_models import llama

REFUSED: list[tuple[list[str], str]] = [
    (["--align"], "give it as --small"),
    (["--share_embeddings"], "--share_embeddings belongs to --small"),
    (["--small", "small", "--align", "--share_embeddings"], "--share_embeddings uses the base's"),
    (["--small", "other", "--share_embeddings"], "reads states 16 wide, but the base's embeddings are 32 wide"),
    (["--small", "small", "--num_shadow_layers", "3"], "--num_shadow_layers is about a shadow made of base layers"),
    (["--small", "small", "--shadow_hidden_size", "16"], "--shadow_hidden_size is about a shadow made of base layers"),
    (["--teacher_cache", "teacher"], "give --distillation_weight"),
    (["--small", "small", "--align", "--teacher_cache", "teacher"], "and no --align"),
    (["--next_token_weight", "0"], "both 0"),
    (["--small", "nowhere/at/all"], "there is no such folder"),
    (["--small", "headless"], "headless lacks weights of its model: lm_head.weight"),
    (["--small", "few"], "knows 200 tokens, the base's tokenizer has 300"),
    (["--shadow_init_layers", "0,9"], "names layer 9, but the base's layers are 0 to 3"),
    (["--shadow_init_layers", "3,0"], "in ascending order"),
    (["--shadow_init_layers", "last"], "shadow_init_layers must be"),
    (["--data", "nothing"], "nothing holds no file"),
    (["--data", "here.jsonl", "owner/elsewhere"], "There is no owner/elsewhere; a dataset of the hub is read alone"),
    (["--held_out", "5000"], "none is left to train on"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_one_message_and_write_nothing(
    wrong: list[str],
    said: str,
    model_folder: Path,
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    Path("here.jsonl").write_text('{"text": "once"}\n')
    if "few" in wrong:
        llama(5, vocab_size=200).save_pretrained("few")
    if "headless" in wrong:
        llama(5, vocab_size=300).model.save_pretrained("headless")
    if "other" in wrong:
        llama(5, vocab_size=300, **SMALL).save_pretrained("other")
    before = set(tmp_path.iterdir())
    assert main([*arguments(model_folder, corpus_folder, tmp_path / "out"), *wrong]) == 1
    assert said in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_an_aligned_small_model_is_pretrained_further_and_used(
    model_folder: Path, corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(5, vocab_size=300, **SMALL).save_pretrained(tmp_path / "small")
    aligned, further, out = (tmp_path / name for name in ("aligned", "further", "out"))
    options = ["--small", str(tmp_path / "small"), "--align", "--data_licence", "CC0-1.0"]
    assert main([*arguments(model_folder, corpus_folder, aligned), *options]) == 0
    assert main([*arguments(model_folder, corpus_folder, further), "--small", str(aligned)]) == 0
    card, facts = (aligned / "README.md").read_text(), json.loads((aligned / "pretraining.json").read_text())["facts"]
    assert str(tmp_path) not in card + (aligned / "pretraining.json").read_text()
    assert 0 < facts["projection"]["relative_error"] < 1
    for said in ("`a.jsonl`", "`b.jsonl`", "Licence of the text: CC0-1.0.", "relative error", "under the head of"):
        assert said in card
    assert "--share_embeddings" not in card
    assert "Licence of the text: not given." in (further / "README.md").read_text()
    first, last = (AutoModelForCausalLM.from_pretrained(folder) for folder in (aligned, further))
    before = llama(5, vocab_size=300, **SMALL).model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in first.shadow_model.state_dict().items())
    embeddings, layer = "embed_tokens.weight", "layers.0.mlp.up_proj.weight"
    assert torch.equal(last.shadow_model.state_dict()[embeddings], before[embeddings])
    assert not torch.equal(last.shadow_model.state_dict()[layer], before[layer])
    capsys.readouterr()
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the red robot"}\n' * 8)
    train = ["--model", str(model_folder), "--shadow_model", str(further), "--data", str(data), "--output", str(out)]
    assert main(["train", *train, "--max_steps", "1", "--use_cpu", "--save_strategy", "no"]) == 0


def test_a_shadow_without_embeddings_is_small_and_is_read_as_the_whole_one(
    model_folder: Path, corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the red robot"}\n' * 8)
    adapters = []
    for name, options in (("whole", []), ("small", ["--no_include_embeddings"])):
        assert main([*arguments(model_folder, corpus_folder, tmp_path / name), *options]) == 0
        train = ["train", "--model", str(model_folder), "--shadow_model", str(tmp_path / name), "--data", str(data)]
        train += ["--output", str(tmp_path / f"{name}-out"), "--max_steps", "1", "--use_cpu", "--save_strategy", "no"]
        train += ["--learning_rate", "0"]
        capsys.readouterr()
        assert main([*train, "--share_embeddings"]) == 0
        assert "MISSING" not in "".join(capsys.readouterr())
        adapters.append(load_file(tmp_path / f"{name}-out" / "shadow_adapter_readout.safetensors"))
    whole, small = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "small"))
    assert whole.keys() - small.keys() == {"model.embed_tokens.weight", "lm_head.weight"} & whole.keys()
    assert all(torch.equal(whole[name], value) for name, value in small.items())
    assert adapters[0].keys() == adapters[1].keys()
    backbones = [{name: t for name, t in stored.items() if name.startswith("shadow_model.")} for stored in adapters]
    assert backbones[0]
    assert all(torch.equal(backbones[0][name], value) for name, value in backbones[1].items())
    assert main([*train, "--output", str(tmp_path / "refused")]) == 1
    assert "add --share_embeddings" in capsys.readouterr().err
    torn = {name: value for name, value in small.items() if "mlp.up_proj" not in name}
    save_file(torn, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    assert main([*train, "--output", str(tmp_path / "refused"), "--share_embeddings"]) == 1
    assert "lacks weights of its model: model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_shadow_without_embeddings_is_pretrained_further_behind_the_bases(
    model_folder: Path, corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--no_include_embeddings"]
    assert main([*arguments(model_folder, corpus_folder, tmp_path / "first"), *small]) == 0
    further = [*small, "--small", str(tmp_path / "first"), "--distillation_weight", "1", "--next_token_weight", "0"]
    capsys.readouterr()
    assert main([*arguments(model_folder, corpus_folder, tmp_path / "refused"), *further]) == 1
    assert "add --share_embeddings" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    still = [*further, "--share_embeddings", "--learning_rate", "0"]
    assert main([*arguments(model_folder, corpus_folder, tmp_path / "still"), *still]) == 0
    assert main([*arguments(model_folder, corpus_folder, tmp_path / "moved"), *still[:-2]]) == 0
    first, same, moved = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "still", "moved"))
    assert first.keys() == same.keys() == moved.keys()
    assert all(torch.equal(first[name], value) for name, value in same.items())
    layer = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[layer], moved[layer])
    ends = [json.loads((tmp_path / name / "pretraining.json").read_text())["curves"] for name in ("first", "still")]
    assert ends[0]["eval_loss"][-1][1] == pytest.approx(ends[1]["eval_loss"][0][1])  # it begins where the first stage ended


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch uses it itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++ here")
def test_a_compiled_run_computes_what_a_plain_one_does(model_folder: Path, corpus_folder: Path, tmp_path: Path) -> None:
    weights: list[dict[str, Any]] = []
    one_layer = ["--num_shadow_layers", "1"]  # a compiler takes its time
    for name, compiled in (("plain", one_layer), ("compiled", [*one_layer, "--compile"])):
        assert main([*arguments(model_folder, corpus_folder, tmp_path / name), *compiled]) == 0
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
