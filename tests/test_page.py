"""What the package page of `shadow-peft` 0.1.x shows, in scripts of our own: the same public calls in the same order.

`make compat` runs the page's own code as well; these need neither it nor a network.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import shadow_peft
from shadow_peft import (
    AutoModelForCausalLMWithHiddenProjection,
    ShadowConfig,
    ShadowForCausalLM,
    ShadowForSequenceClassification,
    ShadowPeftModel,
    get_shadow_model,
    prepare_shadow_model,
)
from tests.hub.fake import FakeHub, connected, running
from tests.tiny_models import llama, qwen3, qwen3_classifier, tokens

ADAPTER_FILES = {"shadow_config.json", "shadow_adapter.safetensors"}
HEADS_FILE = "shadow_modules.safetensors"
VOCABULARY, LARGE, SMALL = 96, 48, 32
"""The small models of `tiny_models` are 32 wide; the large one here is 48 wide."""


def folder_of(path: Path, model: PreTrainedModel) -> str:
    """A model as the page finds it: behind a name that `from_pretrained` takes."""
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> str:
    """In the place of Qwen/Qwen3-0.6B."""
    return folder_of(tmp_path / "small", qwen3())


@pytest.fixture
def large(tmp_path: Path) -> str:
    """In the place of Qwen/Qwen3-8B."""
    return folder_of(tmp_path / "large", qwen3(seed=1, hidden_size=LARGE))


@pytest.fixture
def classifying(tmp_path: Path) -> str:
    """In the place of Qwen/Qwen3-0.6B with a head of two classes."""
    return folder_of(tmp_path / "classifying", qwen3_classifier(num_labels=2))


@pytest.fixture
def projected(tmp_path: Path, small: str, large: str) -> str:
    """In the place of shadow-llm/Qwen3-0.6B-H8B: the small model under the large one's head."""
    small_model, large_model = (AutoModelForCausalLM.from_pretrained(name) for name in (small, large))
    wrapped = AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small_model,
        shadow_hidden_projection=nn.Linear(SMALL, LARGE, bias=False),
        lm_head=large_model.lm_head,
        init_optimal_projection=True,
        reference_lm_head=small_model.lm_head,
    )
    return folder_of(tmp_path / "projected", wrapped)


def make_it_act(model: ShadowPeftModel) -> ShadowPeftModel:
    """A fresh adapter changes nothing; give this one something to say."""
    nn.init.normal_(model.shadow_injection_model.injection_ups)
    return model


def names_in(folder: Path) -> set[str]:
    """The names of the files in a folder."""
    return {path.name for path in folder.iterdir()}


def trained_names(model: nn.Module) -> list[str]:
    """The names of the trained parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# ------------------------------------------------------------------ attaching


def test_quick_start(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(small)
    before = base(input_ids=tokens()).logits
    model = get_shadow_model(base, ShadowConfig(num_shadow_layers=1))
    capsys.readouterr()
    model.print_trainable_parameters()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    line = f"Trainable params: {trained:,} || Total params: {total:,} || Trainable%: {100 * trained / total:.2f}%\n"
    assert capsys.readouterr().out == line
    assert all(name.startswith("shadow_") for name in trained_names(model))
    assert not any(p.requires_grad for p in base.parameters())
    assert torch.equal(model.eval()(input_ids=tokens()).logits, before), "a fresh adapter changes nothing"


@pytest.mark.parametrize(
    ("settings", "published", "line"),
    [
        ({}, 17_724_672, "Trainable params: 17,683,712 || Total params: 613,774,592 || Trainable%: 2.88%\n"),
        (
            {"gate_hidden_size": 8},
            17_503_488,
            "Trainable params: 17,470,720 || Total params: 613,553,408 || Trainable%: 2.85%\n",
        ),
    ],
    ids=["quick start", "implicit shadow"],
)
def test_numbers_at_the_real_size(
    settings: dict[str, int], published: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of 0.1.x, less the update behind the last layer: 4 d k parameters whose state nobody reads are frozen."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    config = Qwen3Config(vocab_size=151936, tie_word_embeddings=True, **sizes, **heads)
    with torch.device("meta"):
        model = get_shadow_model(Qwen3ForCausalLM(config), ShadowConfig(num_shadow_layers=1, **settings))
    capsys.readouterr()
    model.print_trainable_parameters()
    assert capsys.readouterr().out == line
    frozen = sum(p.numel() for p in model.shadow_update_model.parameters() if not p.requires_grad)
    assert frozen == 4 * 1024 * model.shadow_config.gate_hidden_size
    assert model.get_nb_trainable_parameters()[0] + frozen == published


def test_three_parts_are_trained(small: str) -> None:
    model = get_shadow_model(AutoModelForCausalLM.from_pretrained(small), ShadowConfig())
    for part in (model.shadow_model, model.shadow_injection_model, model.shadow_update_model):
        assert any(p.requires_grad for p in part.parameters())


def test_defaults_of_the_configuration() -> None:
    config = ShadowConfig()
    assert (config.num_shadow_layers, config.injection_hidden_size, config.gate_hidden_size) == (1, 16, 10)
    assert (config.alpha, config.dropout, config.modules_to_save) == (0.1, 0.2, [])
    assert config.shadow_intermediate_size is config.shadow_num_attention_heads is None
    assert config.shadow_num_key_value_heads is config.shadow_head_dim is None


def test_implicit_shadow_of_other_sizes(small: str) -> None:
    config = ShadowConfig(
        num_shadow_layers=2,
        injection_hidden_size=8,
        gate_hidden_size=4,
        alpha=0.1,
        dropout=0.1,
        shadow_intermediate_size=24,
        shadow_num_attention_heads=2,
        shadow_num_key_value_heads=1,
        shadow_head_dim=16,
    )
    model = get_shadow_model(AutoModelForCausalLM.from_pretrained(small), config)
    made = model.shadow_model.config
    assert (made.num_hidden_layers, made.intermediate_size) == (2, 24)
    assert (made.num_attention_heads, made.num_key_value_heads, made.head_dim) == (2, 1, 16)
    assert model.shadow_injection_model.injection_downs.shape == (3, SMALL, 8)
    assert not any("embed_tokens" in name for name in model.adapter_state_dict()), "the base's table is shared"


def test_explicit_shadow(large: str, projected: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(large)
    shadow_model = AutoModelForCausalLMWithHiddenProjection.from_pretrained(projected)
    model = get_shadow_model(base, ShadowConfig(gate_hidden_size=8), shadow_model=shadow_model)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.count(" || ") == 2
    assert (model.shadow_hidden_size, model.base_hidden_size) == (SMALL, LARGE)
    assert torch.equal(model.shadow_hidden_projection.weight, shadow_model.shadow_hidden_projection.weight)
    assert any("embed_tokens" in name for name in model.adapter_state_dict()), "it keeps its own table"


def test_explicit_shadow_of_one_layer_without_its_table() -> None:
    shadow = prepare_shadow_model(llama(seed=1, num_hidden_layers=1), remove_embed_tokens=True)
    model = get_shadow_model(llama(), ShadowConfig(), shadow_model=shadow)
    assert model(input_ids=tokens()).logits.shape == (*tokens().shape, VOCABULARY)
    assert not any("embed_tokens" in name for name in model.adapter_state_dict())


def test_a_base_of_one_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 decoder layers"):
        get_shadow_model(llama(num_hidden_layers=1), ShadowConfig())


# ------------------------------------------------------------------ task models


@pytest.fixture
def task_model(large: str, projected: str) -> ShadowForCausalLM:
    """The page's causal LM: a large base, and a small pretrained shadow."""
    shadow_model = AutoModelForCausalLMWithHiddenProjection.from_pretrained(projected)
    base = AutoModelForCausalLM.from_pretrained(large)
    adapted = get_shadow_model(base, ShadowConfig(gate_hidden_size=8, dropout=0.1), shadow_model=shadow_model)
    return ShadowForCausalLM(make_it_act(adapted), shadow_loss_weight=0.05, inference_mode="base_shadow")


def test_two_modes(task_model: ShadowForCausalLM) -> None:
    shape = (*tokens().shape, VOCABULARY)
    attached = task_model.eval()(input_ids=tokens())
    assert attached.logits.shape == attached.shadow_logits.shape == shape
    task_model.set_inference_mode("shadow_only")
    detached = task_model(input_ids=tokens())
    assert detached.logits.shape == shape
    assert torch.equal(detached.logits, detached.shadow_logits)
    assert torch.equal(detached.logits, attached.shadow_logits)
    assert not torch.equal(detached.logits, attached.logits)


def test_loss_of_labels(task_model: ShadowForCausalLM) -> None:
    labels = tokens().clone()
    out = task_model.eval()(input_ids=tokens(), labels=labels)
    of_base, of_shadow = (
        cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
        for logits in (out.logits, out.shadow_logits)
    )
    torch.testing.assert_close(out.loss, of_base + 0.05 * of_shadow)
    task_model.train()(input_ids=tokens(), labels=labels).loss.backward()
    assert all(task_model.get_parameter(name).grad is not None for name in trained_names(task_model) if "injection" in name)


def test_generate(task_model: ShadowForCausalLM) -> None:
    ids = tokens(batch=1)
    settings = {"max_new_tokens": 8, "do_sample": False}
    uncached = task_model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert uncached.shape == (1, ids.shape[1] + 8)
    assert torch.equal(task_model.generate(ids, use_cache=False, **settings), uncached), "ids may be positional"
    assert torch.equal(task_model.generate(ids, use_cache=True, **settings), uncached)


def test_load_a_task_model(task_model: ShadowForCausalLM, large: str, projected: str, tmp_path: Path) -> None:
    task_model.save_pretrained(tmp_path / "out")
    assert names_in(tmp_path / "out") >= ADAPTER_FILES
    loaded = ShadowForCausalLM.from_pretrained(
        AutoModelForCausalLM.from_pretrained(large),
        tmp_path / "out",
        is_trainable=False,
        inference_mode="base_shadow",
        shadow_model=AutoModelForCausalLMWithHiddenProjection.from_pretrained(projected),
    )
    assert trained_names(loaded) == []
    expected, found = (model.eval()(input_ids=tokens()) for model in (task_model, loaded))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.shadow_logits, expected.shadow_logits)


def test_classification(classifying: str, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(classifying, num_labels=2)
    adapted = make_it_act(get_shadow_model(base, ShadowConfig(num_shadow_layers=1)))
    model = ShadowForSequenceClassification(adapted, inference_mode="base_shadow")
    assert model.classifier_head.weight.requires_grad
    assert model.shadow_classifier_head.weight.requires_grad
    attached = model.eval()(input_ids=tokens())
    assert attached.logits.shape == attached.shadow_logits.shape == (len(tokens()), 2)
    model.set_inference_mode("shadow_only")
    assert torch.equal(model(input_ids=tokens()).logits, attached.shadow_logits)

    model.save_pretrained(tmp_path / "out")
    assert names_in(tmp_path / "out") >= {*ADAPTER_FILES, HEADS_FILE}
    fresh = AutoModelForSequenceClassification.from_pretrained(classifying, num_labels=2)
    loaded = ShadowForSequenceClassification.from_pretrained(fresh, tmp_path / "out", is_trainable=False)
    assert trained_names(loaded) == []
    assert torch.equal(loaded(input_ids=tokens()).logits, attached.logits)


@pytest.mark.parametrize("heads", [["classifier_head"], ["classifier_head", "shadow_classifier_head"]])
def test_named_heads_of_a_classifier_are_saved(classifying: str, heads: list[str], tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(classifying)
    config = ShadowConfig(num_shadow_layers=1, modules_to_save=heads)
    ShadowForSequenceClassification(get_shadow_model(base, config)).save_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / HEADS_FILE)) >= {f"{head}.weight" for head in heads}


# ------------------------------------------------------------------ projected models


def test_load_a_projected_model(projected: str) -> None:
    model = AutoModelForCausalLMWithHiddenProjection.from_pretrained(
        projected, freeze_backbone=False, freeze_embed_tokens=True, freeze_lm_head=True
    )
    trained = trained_names(model)
    assert "shadow_hidden_projection.weight" in trained
    assert any(name.startswith("shadow_model.layers.") for name in trained)
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)
    assert model(input_ids=tokens()).logits.shape == (*tokens().shape, VOCABULARY)


def test_wrap_finds_the_best_projection(small: str, large: str, projected: str) -> None:
    assert names_in(Path(projected)) >= {"config.json", "model.safetensors"}
    of_small, of_large = (AutoModelForCausalLM.from_pretrained(name).lm_head.weight.detach() for name in (small, large))
    found = AutoModelForCausalLMWithHiddenProjection.from_pretrained(projected).shadow_hidden_projection.weight.detach()
    torch.testing.assert_close(found, torch.linalg.lstsq(of_large, of_small).solution, rtol=1e-3, atol=1e-4)


def test_wrap_leaves_the_small_model_alone(small: str, large: str) -> None:
    small_model, large_model = (AutoModelForCausalLM.from_pretrained(name) for name in (small, large))
    wrapped = AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small_model,
        shadow_hidden_projection=nn.Linear(SMALL, LARGE, bias=False),
        lm_head=large_model.lm_head,
        init_optimal_projection=False,
    )
    before = small_model(input_ids=tokens()).logits
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    assert torch.equal(small_model(input_ids=tokens()).logits, before)


# ------------------------------------------------------------------ files


def test_save_and_load(small: str, tmp_path: Path) -> None:
    model = make_it_act(get_shadow_model(AutoModelForCausalLM.from_pretrained(small), ShadowConfig(num_shadow_layers=1)))
    model.save_pretrained(tmp_path / "out")
    assert names_in(tmp_path / "out") >= ADAPTER_FILES
    assert HEADS_FILE not in names_in(tmp_path / "out")
    parts = ("shadow_model.", "shadow_injection_model.", "shadow_update_model.")
    assert all(name.startswith(parts) for name in load_file(tmp_path / "out" / "shadow_adapter.safetensors"))

    expected = model.eval()(input_ids=tokens()).logits
    base = AutoModelForCausalLM.from_pretrained(small)
    loaded = ShadowPeftModel.from_pretrained(base, tmp_path / "out", is_trainable=False, shadow_model=None)
    assert trained_names(loaded) == []
    assert torch.equal(loaded(input_ids=tokens()).logits, expected)

    loaded = ShadowPeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True, shadow_model=None)
    assert trained_names(loaded) == trained_names(model)
    assert torch.equal(loaded.eval()(input_ids=tokens()).logits, expected), "the same base, once more"

    base = AutoModelForCausalLM.from_pretrained(small)
    task = ShadowForCausalLM.from_pretrained(base, tmp_path / "out", is_trainable=False, shadow_model=None)
    assert torch.equal(task(input_ids=tokens()).logits, expected)


@pytest.mark.parametrize("heads", [["lm_head"], ["lm_head", "shadow_lm_head"]])
def test_trained_heads_of_a_causal_lm(small: str, heads: list[str], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(small)
    model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(modules_to_save=heads)))
    for head in heads:
        assert getattr(model, head).weight.requires_grad
    model.save_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / HEADS_FILE)) == {f"{head}.weight" for head in heads}
    alone = ShadowPeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path / "out")
    assert alone(input_ids=tokens()).logits.shape == (*tokens().shape, VOCABULARY)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")  # huggingface_hub's own way
def test_push_and_load_from_the_hub(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_it_act(get_shadow_model(AutoModelForCausalLM.from_pretrained(small), ShadowConfig(num_shadow_layers=1)))
    expected = model.eval()(input_ids=tokens()).logits
    with running(FakeHub()) as hub, connected(hub, tmp_path, monkeypatch):
        model.push_to_hub("you/adapter", commit_message="An adapter", private=True, token="hf_test")
        repository = hub.repositories["you/adapter"]
        assert repository.private
        assert set(repository.commits[repository.branches["main"]]) >= ADAPTER_FILES
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        for where in ("you/adapter", "you/adapter@main"):
            base = AutoModelForCausalLM.from_pretrained(small)
            loaded = ShadowPeftModel.from_pretrained(base, where, shadow_model=None)
            assert torch.equal(loaded(input_ids=tokens()).logits, expected)


# ------------------------------------------------------------------ export


def test_export_of_an_implicit_shadow(small: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(small)
    model = ShadowForCausalLM(make_it_act(get_shadow_model(base, ShadowConfig(num_shadow_layers=1))))
    model.peft_model.export_shadow().save_pretrained(tmp_path / "out")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(alone) is Qwen3ForCausalLM
    assert alone.config.num_hidden_layers == 1
    torch.testing.assert_close(alone(input_ids=tokens()).logits, model.eval()(input_ids=tokens()).shadow_logits)


def test_export_of_another_width(task_model: ShadowForCausalLM, tmp_path: Path) -> None:
    exported = task_model.peft_model.export_shadow()
    assert type(exported) is AutoModelForCausalLMWithHiddenProjection
    exported.save_pretrained(tmp_path / "out")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(alone) is AutoModelForCausalLMWithHiddenProjection
    torch.testing.assert_close(alone(input_ids=tokens()).logits, task_model.eval()(input_ids=tokens()).shadow_logits)


# ------------------------------------------------------------------ training


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # a Trainer's default, off where there is no GPU
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # the page uses the old name
def test_trainer(small: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(small)
    adapted = get_shadow_model(base, ShadowConfig(num_shadow_layers=1))
    model = ShadowForCausalLM(adapted, shadow_loss_weight=0.05)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trained"),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        gradient_checkpointing=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=4)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 3
    assert bool(adapted.shadow_injection_model.injection_ups.any())
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in base.state_dict().items())
    model.save_pretrained(tmp_path / "out")
    assert names_in(tmp_path / "out") >= ADAPTER_FILES


def test_version() -> None:
    assert shadow_peft.__version__.split(".")[:2] >= ["0", "1"]
