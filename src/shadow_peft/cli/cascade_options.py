"""The options of `shadow-peft cascade`; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from shadow_peft.cli.ranges import LARGEST_SEED, Dtype, require


@dataclass
class CascadeOptions:
    """Options of `shadow-peft cascade`."""

    model: str | None = field(
        default=None, metadata={"help": "Base of the adapter, by default the one it names; or an exported shadow."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a shadow adapter."})
    remote_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint that takes over, such as http://server:8000/v1."}
    )
    remote_model: str | None = field(
        default=None,
        metadata={"help": "Name of the model there; the variable SHADOW_PEFT_API_KEY holds its key."},
    )
    timeout: float = field(default=30.0, metadata={"help": "Most seconds that the endpoint may take for an answer."})
    threshold: float | None = field(
        default=None, metadata={"help": "Confidence below which the other model takes over; by default cascade.json has it."}
    )
    takeover: Literal["answer", "token"] | None = field(
        default=None,
        metadata={"help": "Answer anew, or go on at the first unsure token; by default as calibrated, or answer."},
    )
    calibrate: str | None = field(default=None, metadata={"help": "Data with right answers to find the threshold on."})
    promise: Literal["quality", "regret", "escalations"] = field(
        default="quality",
        metadata={"help": "What is promised: the mean quality, what it loses to always asking, or how often it asks."},
    )
    target: float | None = field(
        default=None, metadata={"help": "The least quality, or the most regret or escalations, that is promised."}
    )
    confidence: float = field(
        default=0.95, metadata={"help": "How surely the promise is kept; 0 promises the expectation (not of a quality)."}
    )
    quality: Literal["exact_match", "word_overlap", "json_fields"] = field(
        default="exact_match",
        metadata={"help": "What an answer is worth: all or nothing, the F1 of its words, or its share of right fields."},
    )
    data: str | None = field(default=None, metadata={"help": "Data with right answers to score the cascade on."})
    prompt: str | None = field(
        default=None,
        metadata={"help": "Template over the columns of the data, as it was trained with; by default prompt, or text."},
    )
    completion: str | None = field(default=None, metadata={"help": "Template of the right answer; goes with --prompt."})
    class_column: str | None = field(
        default=None, metadata={"help": "Of a classifier, the column of the data with the class; by default label."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Folder for cascade.json and the curve; by default that of adapter or model."}
    )
    batch_size: int = field(default=16, metadata={"help": "Rows of data that are answered together."})
    chat: bool = field(default=False, metadata={"help": "Send each text as a user's message with the chat template."})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the model; auto is that of its file."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, and of the division of the data."})

    def __post_init__(self) -> None:
        if self.adapter is None and (self.model is None or self.remote_url is None):
            raise ValueError("give --adapter; or an exported shadow as --model, and who it asks as --remote_url")
        if (self.remote_url is None) != (self.remote_model is None):
            raise ValueError("--remote_url and --remote_model go together: where the endpoint is, and its model's name")
        if (self.calibrate is None) != (self.target is None):
            raise ValueError("--calibrate and --target go together: the data, and what they are to promise")
        if self.calibrate is not None and self.threshold is not None:
            raise ValueError("--calibrate finds the threshold; drop --threshold")
        if self.output is not None and self.calibrate is None:
            raise ValueError("--output is where --calibrate writes; drop it, or add --calibrate")
        if (self.prompt or self.class_column) and self.calibrate is None and self.data is None:
            raise ValueError("--prompt and --class_column say how data are read; add --calibrate or --data")
        if self.completion is not None and self.prompt is None:
            raise ValueError("--completion goes with --prompt: both are templates of one row")
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"--target must lie between 0 and 1, got {self.target}")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"--confidence must be 0, or lie between 0 and 1, got {self.confidence}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("--threshold is not a number")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"--timeout must be above 0, got {self.timeout}")
        require("batch_size", self.batch_size, 1)
        require("seed", self.seed, 0, LARGEST_SEED)
