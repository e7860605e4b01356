"""What `import shadow_peft` loads; every promise of it holds although names are imported when they are asked for."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import shadow_peft
from shadow_peft.backbone import projected_lm, registration
from tests.tiny_models import llama

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import shadow_peft",
        "import shadow_peft; shadow_peft.__version__; dir(shadow_peft)",
        "from shadow_peft import ShadowConfig; ShadowConfig.from_dict(ShadowConfig().to_dict())",
        "import shadow_peft.cli",
        "import shadow_peft.training",
    ],
)
def test_what_needs_no_tensors_loads_no_torch(code: str) -> None:
    heavy = ("torch", "transformers", "safetensors", "huggingface_hub", "trl", "peft", "datasets")
    assert run_python(f"{code}\nimport sys; print([name for name in {heavy!r} if name in sys.modules])") == "[]\n"


def test_a_config_is_saved_and_loaded_without_torch(tmp_path: Path) -> None:
    code = (
        f"from shadow_peft import ShadowConfig as C; C(num_shadow_layers=3).save_pretrained({str(tmp_path)!r}); "
        f"print(C.from_pretrained({str(tmp_path)!r}).num_shadow_layers); import sys; print('torch' in sys.modules)"
    )
    assert run_python(code) == "3\nFalse\n"


def test_transformers_costs_no_more_after_shadow_peft() -> None:
    load = "from transformers import AutoModelForCausalLM; import sys; print(*sys.modules)"
    alone, after = run_python(load).split(), run_python(f"import shadow_peft; {load}").split()
    added = {name for name in set(after) - set(alone) if name.partition(".")[0] in ("shadow_peft", "torch", "transformers")}
    assert added == {"shadow_peft", "shadow_peft.backbone", "shadow_peft.backbone.registration"}


def test_models_load_nothing_but_what_any_model_of_transformers_loads() -> None:
    """What transformers imports is most of the cost; nothing of ours may add to it."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel; "
        "before = {*sys.modules}; from shadow_peft import *; "
        "print({name.partition('.')[0] for name in {*sys.modules} - before})"
    )
    assert run_python(code) == "{'shadow_peft'}\n"


# ---------------------------------------------------------------- names


def test_every_public_name_is_listed_and_there() -> None:
    assert set(shadow_peft.__all__) == set(shadow_peft._MODULES)
    assert {*shadow_peft.__all__, "__version__"} <= set(dir(shadow_peft))
    for name in shadow_peft.__all__:
        assert getattr(shadow_peft, name).__name__ == name


def test_type_checkers_see_every_public_name(tmp_path: Path) -> None:
    names = ", ".join(shadow_peft.__all__)
    (tmp_path / "user.py").write_text(f"from shadow_peft import {names}, __version__\nreveal_type(ShadowConfig)\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports", "silent", str(tmp_path / "user.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "shadow_peft.config.ShadowConfig" in run.stdout


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'shadow_peft' has no attribute 'ShadowForImages'"):
        _ = shadow_peft.ShadowForImages
    with pytest.raises(ImportError, match="ShadowForImages"):
        from shadow_peft import ShadowForImages  # noqa: F401


def test_version_is_that_of_the_installed_package() -> None:
    assert shadow_peft.__version__ == version("shadow-peft")


def test_config_travels_by_pickle() -> None:
    config = shadow_peft.ShadowConfig(num_shadow_layers=2)
    assert pickle.loads(pickle.dumps(config)) == config


# ---------------------------------------------------------------- projected models


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved projected causal LM."""
    small = llama(5, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    base, projection = llama(), torch.nn.Linear(16, 32, bias=False)
    model = shadow_peft.AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small, shadow_hidden_projection=projection, lm_head=base.lm_head
    )
    model.save_pretrained(folder := tmp_path_factory.mktemp("projected"))
    return folder


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import shadow_peft; from transformers import AutoModelForCausalLM as Auto", ""),
        ("from transformers import AutoModelForCausalLM as Auto; import shadow_peft", ""),
        ("import transformers, shadow_peft; Auto = transformers.AutoModelForCausalLM", ""),
        ("import shadow_peft; from transformers import AutoConfig as Auto", "Config"),
        ("from transformers import AutoConfig as Auto; import shadow_peft", "Config"),
    ],
)
def test_transformers_loads_a_projected_model(code: str, loaded: str, projected: Path) -> None:
    code = f"{code}\nimport warnings; warnings.simplefilter('ignore')\nprint(type(Auto.from_pretrained({str(projected)!r})))"
    name = f"shadow_peft.backbone.projected_lm.AutoModelForCausalLMWithHiddenProjection{loaded}"
    assert run_python(code) == f"<class '{name}'>\n"


def test_the_placeholder_stands_for_the_real_config() -> None:
    placeholder = registration.AutoModelForCausalLMWithHiddenProjectionConfig
    real = projected_lm.AutoModelForCausalLMWithHiddenProjectionConfig
    assert registration.MODEL_TYPE == projected_lm.MODEL_TYPE == placeholder.model_type
    assert isinstance(placeholder(), real)
    assert pickle.loads(pickle.dumps(placeholder)) is placeholder
    with pytest.raises(AttributeError, match="nothing"):
        _ = placeholder.nothing
