"""`shadow-peft train`: where data come from, evaluation, early stopping, resuming, the card, and what it refuses."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from shadow_peft import ShadowForCausalLM
from shadow_peft.cli import main
from shadow_peft.cli.loading import load_model, load_tokenizer
from shadow_peft.training.card import loss_curves
from shadow_peft.training.examples import BadDataError
from shadow_peft.training.sources import load_examples
from shadow_peft.training.templates import PromptTemplate
from tests.cli.conftest import TEMPLATE, tiny_tokenizer, write_lines
from tests.tiny_models import SIZES, Gemma2Config, Gemma2ForCausalLM, llama

ROWS = [{"q": f"say {i}", "a": f"{i} {i}", "options": [f"{i}"] if i % 2 else []} for i in range(8)]
FORM = PromptTemplate(prompt="{q}:", completion=" {a}")
QUIET = ["--disable_tqdm", "True", "--use_cpu", "--per_device_train_batch_size", "4"]


def trained(model: Path, data: Path, output: Path, *options: str) -> dict[str, Any]:
    """The state of a run of the command."""
    places = ["--model", str(model), "--data", str(data), "--output", str(output)]
    assert main(["train", *places, *QUIET, *options]) == 0
    state: dict[str, Any] = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the command says where it refuses."""
    assert main(["train", *options]) == 1
    return capsys.readouterr().err


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "saved"])
def test_data_of_every_kind_gives_the_same_examples(kind: str, tmp_path: Path) -> None:
    rows, path = Dataset.from_list([{"q": row["q"], "a": row["a"]} for row in ROWS]), tmp_path / f"rows.{kind}"
    if kind == "folder":
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    elif kind == "saved":
        DatasetDict(train=rows).save_to_disk(str(path))
    else:
        getattr(rows, f"to_{kind.removesuffix('l')}")(path)
    examples = load_examples(str(path), FORM)
    assert examples[3] == {"prompt": "say 3:", "completion": " 3 3"}
    assert len(examples) == len(ROWS)


def test_a_split_of_a_saved_dataset_without_splits_is_refused(tmp_path: Path) -> None:
    Dataset.from_list([{"q": row["q"], "a": row["a"]} for row in ROWS]).save_to_disk(str(tmp_path / "saved"))
    assert len(load_examples(str(tmp_path / "saved"), FORM)) == len(ROWS)
    with pytest.raises(BadDataError, match=r"without splits has no 'train\[:25%\]'"):
        load_examples(str(tmp_path / "saved"), FORM, split="train[:25%]")


def test_classes_that_no_template_reads_may_be_missing(tmp_path: Path) -> None:
    features = Features({"q": Value("string"), "a": Value("string"), "unused": ClassLabel(names=["x", "y"])})
    Dataset.from_list([{"q": "1", "a": "2", "unused": -1}], features=features).to_parquet(tmp_path / "d.parquet")
    assert load_examples(str(tmp_path / "d.parquet"), FORM).to_list() == [{"prompt": "1:", "completion": " 2"}]


def test_split_may_be_a_slice(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", ROWS)
    assert load_examples(str(path), FORM, split="train[:25%]")["prompt"] == ["say 0:", "say 1:"]


def test_plain_text_is_left_as_it_is(tmp_path: Path) -> None:
    Dataset.from_list([{"text": "once", "id": 1}]).to_csv(tmp_path / "d.csv")
    assert load_examples(str(tmp_path / "d.csv"), PromptTemplate()).to_list() == [{"text": "once"}]


def test_chat_turns_from_templates(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", ROWS)
    example = load_examples(str(path), PromptTemplate(prompt="{q}", completion="{a}", chat=True))[1]
    assert example["prompt"] == [{"role": "user", "content": "say 1"}]
    assert example["completion"] == [{"role": "assistant", "content": "1 1"}]


def test_completion_where_a_list_is_empty(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(BadDataError, match="row 1: the template does not fit: IndexError"):
        load_examples(str(path), PromptTemplate(prompt="{q}", completion="{options[0]}"))
    examples = load_examples(
        str(path), PromptTemplate(prompt="{q}", completion="{options[0]}", completion_if_missing="none")
    )
    assert examples["completion"][:2] == ["none", "1"]


@pytest.mark.parametrize(
    ("rows", "form", "said"),
    [
        (ROWS, PromptTemplate(prompt="{question}", completion="{a}"), "no column question; it has q, a, options"),
        (ROWS, PromptTemplate(prompt="{q", completion="{a}"), "not well formed"),
        (
            ROWS,
            PromptTemplate(prompt="{q}", completion="{a}", class_column="a", class_names=["x"]),
            "row 1: a '0 0' is no index",
        ),
        ([{"q": "x", "a": " "}], FORM, "row 1: 'completion' is empty"),
        ([{"messages": [{"role": "user", "content": "x"}] * 2}], PromptTemplate(), "row 1: the last message must be"),
        (
            ROWS,
            PromptTemplate(),
            "no columns prompt and completion, messages, conversations or text among q, a, options; give",
        ),
    ],
)
def test_bad_rows_are_named(rows: list[Any], form: PromptTemplate, said: str, tmp_path: Path) -> None:
    Dataset.from_list(rows).to_json(tmp_path / "d.json")
    with pytest.raises(BadDataError, match=f"d.json: .*{said}" if "well" not in said else said):
        load_examples(str(tmp_path / "d.json"), form)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_file_that_cannot_be_read_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(BadDataError, match=r"d\.json: "):
        load_examples(str(tmp_path / "d.json"), FORM)


# ---------------------------------------------------------------- null cells


NULLS: list[dict[str, object]] = [{"q": "a", "a": "b", "d": {"e": "x"}}, {"q": None, "a": None, "d": {"e": None}}]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (PromptTemplate(prompt="{q}:", completion="{a}"), "row 2: column q is null"),
        (PromptTemplate(prompt="x", completion="{a}"), "row 2: column a is null"),
        (PromptTemplate(prompt="x", completion="{a!r}"), "row 2: column a is null"),
        (PromptTemplate(prompt="{d[e]}", completion="b"), r"row 2: column d\[e\] is null"),
        (PromptTemplate(prompt="{q.nothing}", completion="b"), "row 1: the template does not fit: AttributeError"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_null_cell_is_no_word(form: PromptTemplate, said: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{kind}"
    getattr(Dataset.from_list(NULLS), f"to_{kind.removesuffix('l')}")(path)
    with pytest.raises(BadDataError, match=rf"d\.{kind}: {said}"):
        load_examples(str(path), form)


def test_what_is_missing_may_stand_for_a_null_completion(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", NULLS)
    form = PromptTemplate(prompt="say:", completion="{a}", completion_if_missing="nothing")
    assert load_examples(str(path), form)["completion"][:] == ["b", "nothing"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\na,b\nc,\n", "row 2: 'completion' is null"),
        ("prompt,completion\n,b\n", "row 1: 'prompt' is null"),
        ("text,other\nonce,1\n,2\n", "row 2: 'text' is null"),
        ("text\n' '\n", None),
        ("prompt,completion\n", "no examples"),
        ("", "d.csv: "),
    ],
)
def test_cells_of_a_table(text: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(text)
    if said is None:
        assert len(load_examples(str(tmp_path / "d.csv"), PromptTemplate())) == 1
        return
    with pytest.raises(BadDataError, match=said):
        load_examples(str(tmp_path / "d.csv"), PromptTemplate())


def test_a_thousand_nulls_are_one_error(tmp_path: Path) -> None:
    Dataset.from_list([{"text": None}] * 1200 + [{"text": "a"}]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(BadDataError, match=r"1200 problem\(s\)"):
        load_examples(str(tmp_path / "d.parquet"), PromptTemplate())


def test_conversations_of_sharegpt_from_a_table(tmp_path: Path) -> None:
    rows = [{"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}] * 2
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    example = load_examples(str(tmp_path / "d.parquet"), PromptTemplate())[1]
    assert example["prompt"] == [{"role": "user", "content": "hi"}]
    assert example["completion"] == [{"role": "assistant", "content": "hello"}]


def test_texts_may_stand_in_another_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"body": "once", "text": 1}])
    assert load_examples(str(path), PromptTemplate(), text_column="body").to_list() == [{"text": "once"}]


def test_half_a_form_is_refused() -> None:
    for wrong in ({"prompt": "x"}, {"chat": True}, {"prompt": "x", "completion": "y", "class_names": ["a"]}):
        with pytest.raises(ValueError, match=r"both or neither|belong to the templates"):
            PromptTemplate(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- a run


def test_options_from_a_file_and_the_card(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model_folder}\ndata: {data_file}\noutput: {tmp_path / 'wrong'}\neval_fraction: 0.25\nmax_steps: 4\n"
        "logging_steps: 1\ninjection_hidden_size: 4\nalpha: 0.3\nlearning_rate: 1e-2\nshadow_loss_weight: 0.5\nseed: 3\n"
    )
    out = tmp_path / "adapter"
    assert main(["train", "--config", str(recipe), "--output", str(out), *QUIET]) == 0
    config = json.loads((out / "shadow_config.json").read_text())
    assert (config["injection_hidden_size"], config["alpha"]) == (4, 0.3)
    results = json.loads((out / "all_results.json").read_text())
    card = ModelCard.load(out / "README.md", ignore_metadata_errors=True)
    assert card.data.library_name == "shadow-peft"
    assert card.data.base_model is None  # a folder of this machine is no id
    figures = [f"| eval loss | {results['eval_loss']:.6g} |", "| seed | 3 |", f"| torch | {version('torch')} |"]
    command = "shadow-peft train --config recipe.yaml --output adapter"
    for said in ("12 training, 4 evaluation", "0.25 held out", command, "losses.png", *figures):
        assert said in card.text, said
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "wrong").exists()


def test_curves_are_both_losses_over_the_steps() -> None:
    log: list[dict[str, float]] = [
        {"loss": 3.0, "base_loss": 2.0, "shadow_loss": 2.5, "step": 1},
        {"loss": 2.0, "base_loss": 1.0, "shadow_loss": 2.0, "step": 2},
        {"eval_loss": 9.0, "step": 2},
        {"train_loss": 5.0, "step": 2},
    ]
    curves = {"base_loss": [(1, 2.0), (2, 1.0)], "shadow_loss": [(1, 2.5), (2, 2.0)], "eval_loss": [(2, 9.0)]}
    assert loss_curves(log) == curves


def test_resumed_run_ends_where_the_whole_one_does(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    options = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--lr_scheduler_type", "constant"]
    whole = trained(model_folder, data_file, tmp_path / "whole", *options)
    cut = tmp_path / "cut"
    trained(model_folder, data_file, cut, *options[2:], "--max_steps", "2")
    resumed = trained(model_folder, data_file, cut, *options, "--resume_from_checkpoint", "last")
    losses = [[row["loss"] for row in state["log_history"] if "loss" in row] for state in (whole, resumed)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    one, other = (load_file(tmp_path / run / "shadow_adapter_readout.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_steps_write_an_untrained_adapter(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    places = ["--model", str(model_folder), "--data", str(data_file), "--output", str(out)]
    options = ["--max_steps", "0", "--eval_fraction", "0.25", "--export", *QUIET]
    assert main(["train", *places, *options]) == 0
    results = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] == 0
    assert results["eval_loss"] > 0
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "shadow_adapter_readout.safetensors", "shadow", "trainer_state.json"} <= names


def test_early_stopping_keeps_the_best(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    often = ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    options = ["--eval_fraction", "0.25", "--max_steps", "20", "--early_stopping_patience", "2", "--learning_rate", "30"]
    state = trained(model_folder, data_file, tmp_path / "out", *often, *options, "--lr_scheduler_type", "constant")
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    assert state["global_step"] < 20
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft
def test_lora_is_trained_by_the_same_command(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    trained(model_folder, data_file, tmp_path / "lora", "--max_steps", "2", "--use_peft", "--lora_r", "3", "--use_dora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"]) == (3, True)
    assert "trained with DoRA" in (tmp_path / "lora" / "README.md").read_text()
    loaded = load_model(str(tmp_path / "lora"))  # as `shadow-peft eval --model` takes it
    assert any("lora_magnitude_vector" in name for name in loaded.state_dict())


def test_texts_are_learned_whole(model_folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "go to the red door now"}] * 4)
    state = trained(model_folder, path, tmp_path / "out", "--max_steps", "1", "--logging_steps", "1")
    tokens = len(tiny_tokenizer()("go to the red door now")["input_ids"]) + 1  # and the end of the text
    assert state["log_history"][0]["num_tokens"] == 4 * tokens


def test_too_long_rows_are_counted_and_all_of_them_are_an_error(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[object] = [{"prompt": "go " * 30, "completion": "x"}, {"prompt": "go", "completion": " on"}]
    places = ["--model", str(model_folder), "--output", str(tmp_path / "out"), *QUIET, "--max_length", "16"]
    long = write_lines(tmp_path / "long.jsonl", rows[:1] * 3)
    said = refused(capsys, "--data", str(long), *places)
    assert said.splitlines() == [
        "shadow-peft train: no row is left for training: all prompts alone fill --max_length 16 tokens; raise it"
    ]
    both = write_lines(tmp_path / "both.jsonl", rows * 2)
    said = refused(capsys, "--data", str(both), "--eval_data", str(long), *places)
    assert "no row is left for evaluation" in said
    assert main(["train", "--data", str(both), *places, "--max_steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2 rows for training" in shown
    assert "2 for training dropped: their prompts alone fill --max_length" in shown


@pytest.mark.parametrize("text", ["", "\n\n"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_an_empty_file_is_one_error(
    text: str, suffix: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"d.{suffix}"
    path.write_text(text)
    said = refused(capsys, "--model", str(model_folder), "--data", str(path), "--output", str(tmp_path / "out"), *QUIET)
    assert f"{path}: " in said
    assert len(said.splitlines()) == 2
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- chat templates


def test_a_template_of_a_file_is_used_and_saved(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to you"}]
    data = write_lines(tmp_path / "d.jsonl", [{"messages": talk}] * 4)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    trained(model_folder, data, tmp_path / "out", "--max_steps", "1", "--chat_template_path", str(tmp_path / "t.jinja"))
    assert "--chat hi" in capsys.readouterr().out
    assert main(["generate", "--adapter", str(tmp_path / "out"), "--chat", "hi", "--max_new_tokens", "2"]) == 0


def test_a_template_of_another_tokenizer(model_folder: Path, chat_folder: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to you"}]
    data = write_lines(tmp_path / "d.jsonl", [{"messages": talk}] * 4)
    trained(model_folder, data, tmp_path / "out", "--max_steps", "1", "--chat_template_path", str(chat_folder))
    assert load_tokenizer(str(tmp_path / "out")).chat_template == TEMPLATE


def test_a_template_with_tokens_that_the_base_does_not_know_is_refused(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = "<|turn|>" + TEMPLATE
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    places = ["--model", str(model_folder), "--data", str(data_file), "--output", str(tmp_path / "out"), *QUIET]
    said = refused(capsys, *places, "--chat_template_path", str(tmp_path / "other"))
    assert "its template needs the tokens <|turn|>, which the base does not know" in said
    assert "has no chat template" in refused(capsys, *places, "--chat_template_path", str(tmp_path / "bare"))
    assert "there is no file" in refused(capsys, *places, "--chat_template_path", str(tmp_path / "no.jinja"))


def test_packing_reaches_the_trainer(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    options = [
        "--max_steps",
        "1",
        "--packing",
        "--packing_strategy",
        "wrapped",
        "--max_length",
        "16",
        "--logging_steps",
        "1",
    ]
    state = trained(model_folder, data_file, tmp_path / "packed", *options)
    assert state["log_history"][0]["num_tokens"] == 4 * 16


@pytest.mark.parametrize("shares", [False, True])
def test_a_model_of_ones_own_becomes_the_shadow(shares: bool, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    small, output = llama(5, vocab_size=300, num_hidden_layers=2), tmp_path / "out"
    small.save_pretrained(tmp_path / "small")
    options = ["--shadow_model", str(tmp_path / "small"), *["--share_embeddings"] * shares]
    trained(model_folder, data_file, output, "--max_steps", "1", "--learning_rate", "0", "--export", *options)
    stored, own = load_file(output / "shadow_adapter_readout.safetensors"), small.model.state_dict()
    if shares:
        del own["embed_tokens.weight"]
    found = {name.removeprefix("shadow_model."): t for name, t in stored.items() if name.startswith("shadow_model.")}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    base, exported = load_model(str(model_folder)), load_model(str(output / "shadow"))
    table = base.get_input_embeddings().weight if shares else small.get_input_embeddings().weight
    assert torch.equal(exported.get_input_embeddings().weight, table)
    assert torch.equal(exported.lm_head.weight, base.lm_head.weight)


def test_a_narrow_model_speaks_through_the_head_of_the_base(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    small, output = llama(5, vocab_size=300, **sizes), tmp_path / "out"
    small.save_pretrained(tmp_path / "small")
    options = ["--shadow_model", str(tmp_path / "small"), "--max_steps", "1", "--learning_rate", "0", "--export"]
    trained(model_folder, data_file, output, *options)
    base, exported, ids = load_model(str(model_folder)), load_model(str(output / "shadow")), torch.arange(3, 23)[None]
    best = torch.linalg.lstsq(base.lm_head.weight.double(), small.lm_head.weight.double()).solution
    stored = load_file(output / "shadow_adapter_readout.safetensors")["shadow_hidden_projection.weight"]
    torch.testing.assert_close(stored.double(), best, rtol=1e-4, atol=1e-5)
    states = small.model(ids).last_hidden_state
    torch.testing.assert_close(exported(ids).logits, base.lm_head(states @ best.float().T), rtol=1e-3, atol=1e-4)
    assert type(exported).__name__ == "LlamaForCausalLM"


def test_a_shadow_that_cannot_be_folded_is_exported_with_its_projection(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, small, output = tmp_path / "base", tmp_path / "small", tmp_path / "out"
    Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "vocab_size": 300})).save_pretrained(base)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(base)
    llama(5, vocab_size=300, hidden_size=16).save_pretrained(small)
    trained(base, data_file, output, "--shadow_model", str(small), "--max_steps", "1", "--export")
    said = "note: the shadow is exported with its projection apart: the logits are capped at 30.0"
    assert said in capsys.readouterr().err
    assert json.loads((output / "shadow" / "config.json").read_text())["architectures"] == [
        "AutoModelForCausalLMWithHiddenProjection"
    ]
    assert (output / "README.md").is_file()


def test_a_model_of_another_vocabulary_is_refused_as_a_shadow(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(5, vocab_size=200, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "small")
    places = ["--model", str(model_folder), "--data", str(data_file), "--output", str(tmp_path / "out")]
    said = refused(capsys, *places, "--shadow_model", str(tmp_path / "small"))
    assert "its vocabulary has 200 tokens, the base's tokenizer has 300" in said
    assert not (tmp_path / "out").exists()


def test_rates_and_losses_of_the_shadow(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    weights = {"distillation_weight": 0.5, "distillation_temperature": 2.0, "distillation_warmup_ratio": 1.0}
    options = [word for name, value in weights.items() for word in (f"--{name}", str(value))]
    where = model_folder, data_file, tmp_path / "out"
    state = trained(*where, "--max_steps", "2", "--logging_steps", "1", "--shadow_learning_rate_scale", "0", *options)
    rows = [row for row in state["log_history"] if "distillation_loss" in row]
    for row, risen in zip(rows, (0.5, 1.0), strict=True):
        parts = row["base_loss"] + 0.05 * row["shadow_loss"] + risen * 0.5 * row["distillation_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-3)
    fresh = ShadowForCausalLM.from_pretrained(load_model(str(model_folder)), tmp_path / "out")
    assert {name: getattr(fresh, name) for name in weights} == weights


# ---------------------------------------------------------------- what is refused, before anything is written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--eval_fraction", "0.1", "--eval_split", "test"], "--eval_fraction holds out a part"),
        (["--eval_fraction", "1.5"], "must lie between 0 and 1, got 1.5"),
        (["--eval_strategy", "steps"], "--eval_strategy needs --eval_data"),
        (["--early_stopping_patience", "2", "--eval_fraction", "0.1"], "give --eval_strategy and --save_strategy"),
        (["--early_stopping_patience", "2", "--eval_fraction", "0.1", "--eval_strategy", "steps", "--eval_steps", "3",
          "--save_steps", "4"], "must be a multiple of --eval_steps"),
        (["--lora_r", "8"], "--lora_r belongs to LoRA; add --use_peft"),
        (["--use_peft", "--num_shadow_layers", "2"], "--num_shadow_layers belongs to a shadow"),
        (["--use_peft", "--export"], "--export belongs to a shadow"),
        (["--use_peft", "--distillation_weight", "1"], "--distillation_weight belongs to a shadow"),
        (["--use_peft", "--shadow_model", "x"], "--shadow_model belongs to a shadow"),
        (["--shadow_model", "x", "--num_shadow_layers", "2"], "--num_shadow_layers is for a shadow made from the base"),
        (["--share_embeddings"], "--share_embeddings belongs to --shadow_model"),
        (["--shadow_model", "/nowhere"], "cannot load a causal language model from '/nowhere'"),
        (["--distillation_warmup_ratio", "2"], "distillation_warmup_ratio must lie in [0, 1], got 2.0"),
        (["--model_name_or_path", "x"], "give the base as --model"),
        (["--resume_from_checkpoint", "last"], "there is no finished checkpoint in"),
        (["--resume_from_checkpoint", "/nowhere"], "is no finished checkpoint of a trainer: it is no folder"),
        (["--prompt", "{q}"], "give both or neither"),
        (["--data_split", "test"], 'Unknown split "test"'),
        (["--report_to", "a_diary"], "a_diary is not supported"),
    ],
)  # fmt: skip
def test_contradictions_are_one_message(
    options: list[str], said: str, model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    places = ["--model", str(model_folder), "--data", str(data_file), "--output", str(out)]
    assert said in refused(capsys, *places, *QUIET, *options)
    assert not out.exists()


def test_file_of_options_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "unknown.yaml").write_text("model: m\ndata: d\noutput: o\ninjection_size: 3\n")
    assert "nowhere.yaml" in refused(capsys, "--config", str(tmp_path / "nowhere.yaml"))
    assert "broken.yaml" in refused(capsys, "--config", str(tmp_path / "broken.yaml"))
    assert "injection_size" in refused(capsys, "--config", str(tmp_path / "unknown.yaml"))


def test_what_fsdp_cannot_do_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    places = ["--model", "m", "--data", "d", "--output", "o"]
    assert "--export needs the base in one process" in refused(capsys, *places, "--export")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert "fsdp_cpu_ram_efficient_loading: false" in refused(capsys, *places)


def test_zero_3_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "use FSDP2" in refused(capsys, "--model", "m", "--data", "d", "--output", "o")


def test_output_that_is_a_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused(capsys, "--model", "m", "--data", "d", "--output", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_output_that_holds_another_model_is_refused_at_once(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds a model (config.json" in refused(capsys, "--model", "m", "--data", "d", "--output", str(model_folder))
