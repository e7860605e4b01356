"""`max_steps=0`: nothing is trained, and what a run writes is written all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.steps import TRL_NAMES, small_model
from tests.training.test_quantized import TRAINERS
from tests.training.test_reward import reward_model

pytestmark = TRL_NAMES


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "Trainer"])
def test_no_step_is_taken(name: str, tmp_path: Path) -> None:
    model = reward_model() if name == "reward" else small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"max_steps": 0, "learning_rate": 1.0, "lr_scheduler_type": "constant", "save_strategy": "steps"}
    trainer = TRAINERS[name](model, tmp_path, callbacks=[], **settings)
    result = trainer.train()
    trainer.save_metrics("train", result.metrics)
    trainer.save_model()
    assert (result.global_step, result.training_loss) == (0, 0.0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    names = {path.name for path in tmp_path.iterdir()}
    assert "train_results.json" in names
    assert any(name.endswith(".safetensors") for name in names)
    assert not any(name.startswith("checkpoint") for name in names)
    assert getattr(model, "training_progress", 1.0) == 1.0
