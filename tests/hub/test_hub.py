"""Pushing to a hub and loading from it, against a hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowPeftModel
from shadow_peft.cli.loading import load_tokenizer
from shadow_peft.storage.hub import local_directory
from tests.cli.conftest import TEMPLATE, tiny_tokenizer
from tests.hub.fake import FakeHub, Repository, connected, running
from tests.test_atomic_save import stop_after_commit
from tests.test_base_adapters import shadowed, with_lora
from tests.tiny_models import adapted, causal_lm, llama, tokens

# huggingface_hub's own way of sending a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

TOKEN = "hf_test"
EXAMPLE = Path(__file__).parents[2] / "examples" / "hub.py"


@pytest.fixture(params=[False, True], ids=["regular", "lfs"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fresh hub that huggingface_hub takes for the only one, with an empty cache and no token on this machine."""
    with running(FakeHub(lfs=request.param)) as hub, connected(hub, tmp_path, monkeypatch):
        yield hub


def logits(model: ShadowPeftModel | ShadowForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens()).logits
    return result


@pytest.mark.parametrize(
    ("make", "load"),
    [(causal_lm, ShadowForCausalLM.from_pretrained), (adapted, ShadowPeftModel.from_pretrained)],
    ids=["task model", "adapter"],
)
def test_what_was_pushed_is_what_is_loaded(hub: FakeHub, make: Callable[..., object], load: Callable[..., object]) -> None:
    model = make(llama())
    where = model.push_to_hub("org/shadow", token=TOKEN)
    assert where.startswith(f"{hub.endpoint}/org/shadow/commit/")
    assert torch.equal(logits(load(llama(), "org/shadow")), logits(model))
    assert ShadowConfig.from_pretrained("org/shadow") == model.shadow_config
    assert "shadow_config.json" in hub.repositories["org/shadow"].commits[hub.repositories["org/shadow"].branches["main"]]


def test_trained_heads_travel_along(hub: FakeHub) -> None:
    model = causal_lm(llama(), modules_to_save=["lm_head", "shadow_lm_head"])
    with torch.no_grad():
        model.peft_model.task_heads["lm_head"].weight.mul_(1.5)
    model.push_to_hub("org/shadow", token=TOKEN)
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow")), logits(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("variant", ["published", "peft"])
def test_adapters_of_the_base_travel_along(hub: FakeHub, variant: str) -> None:
    model = shadowed(with_lora(), variant=variant).eval()
    model.push_to_hub("org/shadow", token=TOKEN)
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow")), logits(model))


@pytest.mark.parametrize(("old", "new"), [("published", "peft"), ("peft", "readout"), ("readout", "published")])
def test_a_push_takes_the_place_of_an_earlier_one(hub: FakeHub, old: str, new: str) -> None:
    causal_lm(llama(), variant=old, modules_to_save=["lm_head"]).push_to_hub("org/shadow", token=TOKEN)
    repository = hub.repositories["org/shadow"]
    repository.commit("main", {**repository.commits[repository.branches["main"]], "README.md": b"mine"})
    model = causal_lm(llama(), seed=5, variant=new)
    model.push_to_hub("org/shadow", token=TOKEN)
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow")), logits(model))
    files = repository.commits[repository.branches["main"]]
    assert files["README.md"] == b"mine"
    assert "shadow_modules.safetensors" not in files


def test_a_folder_with_an_interrupted_save_may_be_uploaded_as_it_is(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal_lm(llama(), seed=5, variant="readout")
    causal_lm(llama(), variant="published").save_pretrained(tmp_path)
    stop_after_commit(monkeypatch, lambda: model.save_pretrained(tmp_path))
    api = huggingface_hub.HfApi(token=TOKEN)
    api.create_repo("org/shadow")
    api.upload_folder(repo_id="org/shadow", folder_path=tmp_path)
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow")), logits(model))


def test_each_revision_keeps_its_own_adapter(hub: FakeHub) -> None:
    first, second = causal_lm(llama(), seed=1), causal_lm(llama(), seed=2)
    first.push_to_hub("org/shadow", token=TOKEN)
    second.push_to_hub("org/shadow", token=TOKEN, revision="v2")
    second.push_to_hub("org/shadow", token=TOKEN, revision="v2")  # the branch is there already
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow")), logits(first))
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow@v2")), logits(second))
    commit = hub.repositories["org/shadow"].branches["main"]
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), f"org/shadow@{commit}")), logits(first))


@pytest.mark.parametrize("private", [True, False])
def test_the_server_gets_what_the_caller_asks_for(hub: FakeHub, private: bool) -> None:
    causal_lm(llama()).push_to_hub("org/shadow", private=private, commit_message="Second try", revision="dev", token=TOKEN)
    (created,) = hub.sent_to("/api/repos/create")
    assert created.json["organization"] == "org"
    assert created.json["name"] == "shadow"
    assert hub.repositories["org/shadow"].private is private
    assert hub.sent_to("/api/models/org/shadow/branch/dev")
    (commit,) = hub.sent_to("/commit/")
    assert commit.path == "/api/models/org/shadow/commit/dev"
    assert commit.lines[0]["value"]["summary"] == "Second try"
    assert "create_pr" not in commit.query
    ours = [r for r in hub.requests if r is created or "/org/shadow" in r.path]  # the client asks other things by itself
    assert {r.token for r in ours if not r.path.startswith("/lfs/")} == {TOKEN}


def test_a_pull_request_leaves_the_branch_alone(hub: FakeHub) -> None:
    first, second = causal_lm(llama(), seed=1), causal_lm(llama(), seed=2)
    first.push_to_hub("org/shadow", token=TOKEN)
    where = second.push_to_hub("org/shadow", token=TOKEN, create_pr=True)
    assert where == f"{hub.endpoint}/org/shadow/discussions/1"
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow")), logits(first))
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow@refs/pr/1")), logits(second))


def test_only_the_files_of_the_adapter_are_fetched(hub: FakeHub) -> None:
    causal_lm(llama()).push_to_hub("org/shadow", token=TOKEN)
    repository = hub.repositories["org/shadow"]
    repository.commit("main", {**repository.commits[repository.branches["main"]], "pytorch_model.bin": b"not wanted"})
    ShadowForCausalLM.from_pretrained(llama(), "org/shadow")
    assert not [r for r in hub.requests if r.path.endswith("pytorch_model.bin")]


def test_adapters_in_folders_of_a_repository(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["org/many"] = Repository(private=False)
    models = {name: causal_lm(llama(), seed=seed) for seed, name in enumerate(["one", "nested/two"])}
    files: dict[str, bytes] = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        files |= {f"{name}/{path.name}": path.read_bytes() for path in (tmp_path / name).iterdir()}
    hub.repositories["org/many"].commit("main", files)
    hub.repositories["org/many"].commit("v1", {name.replace("one/", "other/"): data for name, data in files.items()})
    for name, model in models.items():
        assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), f"org/many/{name}")), logits(model))
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/many/other@v1")), logits(models["one"]))
    with pytest.raises(ValueError, match="'org/many' has no adapter in a folder 'three'"):
        ShadowForCausalLM.from_pretrained(llama(), "org/many/three")


def test_what_is_in_the_cache_needs_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm(llama())
    model.push_to_hub("org/shadow", token=TOKEN)
    ShadowForCausalLM.from_pretrained(llama(), "org/shadow")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(llama(), "org/shadow")), logits(model))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("org/nothing", "'org/nothing' is neither a directory nor a hub repository"),
        ("org/shadow@v9", "hub repository 'org/shadow' has no revision 'v9'"),
        ("no/such/folder", "'no/such/folder' is neither a directory nor a hub repository"),
        ("./no-such-folder", "'./no-such-folder' is neither a directory nor a hub repository"),
        ("org/empty", "holds no shadow adapter"),
    ],
)
def test_what_cannot_be_found_is_one_clear_error(hub: FakeHub, where: str, message: str) -> None:
    causal_lm(llama()).push_to_hub("org/shadow", token=TOKEN)
    hub.repositories["org/empty"] = type(hub.repositories["org/shadow"])(private=False)
    base = llama()
    before = logits(base)
    with pytest.raises(ValueError, match=message):
        ShadowForCausalLM.from_pretrained(base, where)
    assert torch.equal(logits(base), before)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_hub_out_of_reach_is_one_clear_error(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'org/shadow' is no directory, and the hub cannot be reached"):
        ShadowForCausalLM.from_pretrained(llama(), "org/shadow")


def test_a_private_repository_is_missing_without_a_token(hub: FakeHub) -> None:
    causal_lm(llama()).push_to_hub("org/shadow", private=True, token=TOKEN)
    with pytest.raises(ValueError, match="log in"):
        ShadowForCausalLM.from_pretrained(llama(), "org/shadow")


def test_a_save_that_fails_creates_no_repository(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm(llama())

    def fail(directory: str, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(model.peft_model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.push_to_hub("org/shadow", token=TOKEN)
    assert not hub.requests


def test_the_example_in_a_process_of_its_own(tmp_path: Path) -> None:
    with running(FakeHub()) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, str(EXAMPLE), "you/my-shadow", "--revision", "v1"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "you/my-shadow@v1 gives the same logits" in run.stdout
    assert hub.repositories["you/my-shadow"].private


def test_a_calibration_beside_an_adapter_is_fetched(hub: FakeHub) -> None:
    causal_lm(llama()).push_to_hub("org/shadow", token=TOKEN)
    repository = hub.repositories["org/shadow"]
    repository.commit("main", {**repository.commits[repository.branches["main"]], "cascade.json": b"{}"})
    assert (local_directory("org/shadow") / "cascade.json").read_bytes() == b"{}"


def test_a_tokenizer_beside_an_adapter_is_used(hub: FakeHub, tmp_path: Path) -> None:
    causal_lm(llama()).push_to_hub("org/shadow", token=TOKEN)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "own")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    repository, own = hub.repositories["org/shadow"], {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert load_tokenizer("org/shadow", str(tmp_path / "base")).chat_template is None
    repository.commit("main", {**repository.commits[repository.branches["main"]], **own})
    assert load_tokenizer("org/shadow", str(tmp_path / "base")).chat_template == TEMPLATE
