"""The options of `shadow-peft pretrain`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shadow_peft.cli.ranges import LARGEST_SEED, Dtype, require

#: Options of `shadow-peft pretrain` about a shadow that is made of layers of the base.
IMPLICIT_OPTIONS = (
    *("num_shadow_layers", "shadow_init_layers", "shadow_init", "shadow_hidden_size"),
    *("shadow_intermediate_size", "shadow_num_attention_heads", "shadow_num_key_value_heads"),
)


@dataclass
class PretrainOptions:
    """Options of `shadow-peft pretrain`."""

    model: str = field(metadata={"help": "Folder or hub id of the base."})
    data: list[str] = field(metadata={"help": "Files or folders of text, or the id of a dataset on the hub."})
    output: str = field(metadata={"help": "Folder for the finished shadow, its card and curve, and the checkpoints."})
    max_steps: int = field(metadata={"help": "Optimizer steps that the learning rate is planned for."})
    resume: bool = field(
        default=False,
        metadata={"help": "Go on from the newest finished checkpoint in OUTPUT; where there is none, start."},
    )
    small: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a small model to take as the shadow, instead of layers of the base."},
    )
    share_embeddings: bool = field(
        default=False,
        metadata={"help": "Feed --small the base's embeddings; for a shadow that was written without its own."},
    )
    align: bool = field(
        default=False,
        metadata={"help": "Train the projection of --small alone, by distilling the small model's own head."},
    )
    num_shadow_layers: int = field(default=2, metadata={"help": "Decoder layers of the shadow."})
    shadow_init_layers: str = field(
        default="even",
        metadata={
            "help": "Which layers of the base it starts from: first, even (evenly spaced), or numbers such as 0,9,29."
        },
    )
    shadow_init: Literal["base", "random"] = field(
        default="base", metadata={"help": "Copies of the base's layers, or random weights."}
    )
    shadow_hidden_size: int | None = field(
        default=None,
        metadata={"help": "Width; another than the base's is found by projecting the base's states, and has a projection."},
    )
    shadow_intermediate_size: int | None = field(
        default=None, metadata={"help": "Neurons of each MLP; by default as many as the base has."}
    )
    shadow_num_attention_heads: int | None = field(
        default=None, metadata={"help": "Attention heads; by default as many as the base has."}
    )
    shadow_num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key/value heads; by default as many as the base has."}
    )
    next_token_weight: float | None = field(
        default=None, metadata={"help": "Weight of the cross entropy with the text; by default 1, with --align 0."}
    )
    distillation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the KL divergence from the teacher's next-token distribution; by default 0, with --align 1."
        },
    )
    top_k: int = field(default=32, metadata={"help": "The teacher's most likely tokens that this divergence compares."})
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder to keep the base's most likely tokens in: computed once, for every run on the same text."},
    )
    data_licence: str | None = field(default=None, metadata={"help": "Licence of the text, for the model card."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    data_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    data_split: str = field(default="train", metadata={"help": "Split of a dataset on the hub."})
    context: int = field(default=512, metadata={"help": "Tokens of a block."})
    held_out: int = field(default=64, metadata={"help": "Blocks that are held out for evaluation."})
    shuffle_buffer: int = field(default=2000, metadata={"help": "Documents among which the next one is drawn."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks of one forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes of one optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps in which the learning rate rises."})
    decay_fraction: float = field(default=0.25, metadata={"help": "Last part of the steps, in which it falls to 0."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the matrices."})
    eval_steps: int = field(default=250, metadata={"help": "Steps between two evaluations."})
    save_steps: int = field(default=250, metadata={"help": "Steps between two checkpoints."})
    logging_steps: int = field(default=25, metadata={"help": "Steps between two lines of the log."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and order."})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the base, in which the shadow computes, too."})
    use_cpu: bool = field(default=False, metadata={"help": "Compute on the CPU where there is a GPU, too."})
    include_embeddings: bool = field(
        default=True,
        metadata={"help": "Write the base's embeddings, too; without them the shadow is small, and needs its base."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the shadow, which needs a C++ compiler."})

    def __post_init__(self) -> None:
        for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "save_steps"):
            require(name, getattr(self, name), 1)
        for name in ("logging_steps", "held_out", "shuffle_buffer", "num_shadow_layers", "top_k"):
            require(name, getattr(self, name), 1)
        require("context", self.context, 2)
        for name in ("learning_rate", "warmup_steps", "weight_decay", "next_token_weight", "distillation_weight"):
            require(name, getattr(self, name), 0)
        require("decay_fraction", self.decay_fraction, 0, 1)
        require("seed", self.seed, 0, LARGEST_SEED)
        if self.weights == (0, 0):
            raise ValueError("--next_token_weight and --distillation_weight are both 0: nothing would be learned")
        self._check_stage()

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the next-token loss and of the distillation."""
        next_token, distillation = (0.0, 1.0) if self.align else (1.0, 0.0)
        return (
            next_token if self.next_token_weight is None else self.next_token_weight,
            distillation if self.distillation_weight is None else self.distillation_weight,
        )

    def _check_stage(self) -> None:
        """Refuse options that would do nothing beside the others."""
        if self.align and self.small is None:
            raise ValueError("--align trains the projection of a small model: give it as --small")
        if self.share_embeddings and self.small is None:
            raise ValueError("--share_embeddings belongs to --small; layers of the base share them where they can")
        if self.share_embeddings and self.align:
            raise ValueError("--align learns from the head of a small model, and --share_embeddings uses the base's")
        defaults = {name: PretrainOptions.__dataclass_fields__[name].default for name in IMPLICIT_OPTIONS}
        given = [name for name in IMPLICIT_OPTIONS if getattr(self, name) != defaults[name]]
        if self.small is not None and given:
            raise ValueError(f"--{given[0]} is about a shadow made of base layers, and --small takes another model")
        if self.teacher_cache is not None and (self.align or self.weights[1] == 0):
            raise ValueError("--teacher_cache keeps what the base teaches: give --distillation_weight, and no --align")
