"""Trainers, optimizer groups and the gradient monitor, and reading training data.

A name is imported when it is first used, so this package needs TRL only where one of TRL's trainers is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shadow_peft.training.dpo import ShadowDPOTrainer
    from shadow_peft.training.groups import parameter_groups
    from shadow_peft.training.grpo import ShadowGRPOTrainer
    from shadow_peft.training.mixin import ShadowTrainerMixin
    from shadow_peft.training.monitor import GradientMonitor, GradientWatch
    from shadow_peft.training.progress import ProgressCallback
    from shadow_peft.training.reward import ShadowRewardTrainer
    from shadow_peft.training.sft import ShadowSFTTrainer
    from shadow_peft.training.trainer import ShadowTrainer

__all__ = [
    "GradientMonitor",
    "GradientWatch",
    "ProgressCallback",
    "ShadowDPOTrainer",
    "ShadowGRPOTrainer",
    "ShadowRewardTrainer",
    "ShadowSFTTrainer",
    "ShadowTrainer",
    "ShadowTrainerMixin",
    "parameter_groups",
]

_MODULES = {
    "GradientMonitor": "monitor",
    "GradientWatch": "monitor",
    "ProgressCallback": "progress",
    "ShadowDPOTrainer": "dpo",
    "ShadowGRPOTrainer": "grpo",
    "ShadowRewardTrainer": "reward",
    "ShadowSFTTrainer": "sft",
    "ShadowTrainer": "trainer",
    "ShadowTrainerMixin": "mixin",
    "parameter_groups": "groups",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
