"""One contender in a process of its own: it reads requests as lines of JSON and answers each with a line.

    {"do": "time", "batch": 8, "prompt": 128, "tokens": 32}     -> {"prefill": seconds, "decode": seconds per token}
    {"do": "operations", "batch": 1}                            -> {"operations": of one decoding step, views apart}
    {"do": "statistics"}                                        -> what became of the drafts so far

Prefill is `generate` of one token; a decoding step is what every further token adds to that. Seconds are those of the
processor, without what is spent waiting for other programs, or of a GPU. Prompts are random tokens, or successive pieces
of a text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, logging

from benchmarks import devices
from benchmarks.decoding.contenders import CONTENDERS, SOURCE, VOCABULARY, draft_with_oracle
from benchmarks.shapes import SHAPES

VIEWS = ("view", "t.", "transpose", "slice", "split", "chunk", "expand", "unbind", "select", "_unsafe_view", "detach",
         "alias", "unsqueeze", "squeeze", "permute", "as_strided", "unflatten", "reshape")  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts dispatched operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not str(func).removeprefix("aten.").startswith(VIEWS)
        return func(*args, **(kwargs or {}))


class Worker:
    """A contender and what it is asked.

    Args:
        name: the contender.
        drafts: None for none, "own" for the shadow's own, or how often an oracle is right.
        text: a text whose pieces are the prompts, read with the base's tokenizer; None for random tokens.
        assistant_vocab_size: what `generate` is told with drafts.
    """

    def __init__(
        self, name: str, drafts: str | None = None, text: str | None = None, assistant_vocab_size: int | None = None
    ) -> None:
        self.model, self.drafts_by = CONTENDERS[name](), drafts
        self.ids = None
        if text is not None:
            tokenizer = AutoTokenizer.from_pretrained(SOURCE.base)
            self.ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
        self.settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        self.vocab_size = assistant_vocab_size
        self.statistics: list[Any] = []
        self.written: dict[tuple[int, int, int], Tensor] = {}

    def time(self, batch: int, prompt: int, tokens: int) -> dict[str, float]:
        """Seconds of the prompt's pass, and of every step behind it."""
        ids = self._prompts(batch, prompt)
        drafting = dict(self.settings)
        if self.drafts_by not in (None, "own"):
            if (batch, prompt, tokens) not in self.written:
                written = self.model.generate(input_ids=ids, max_new_tokens=tokens, **self.settings)
                self.written[batch, prompt, tokens] = written
            draft_with_oracle(self.written[batch, prompt, tokens], float(self.drafts_by), seed=len(self.statistics))
        if self.drafts_by is not None:
            drafting |= {"use_shadow_draft": True, "return_dict_in_generate": True, "assistant_vocab_size": self.vocab_size}
        prefill = min(self._seconds(ids, 1, self.settings) for _ in range(2))
        whole = self._seconds(ids, tokens, drafting)
        return {"prefill": prefill, "decode": (whole - prefill) / (tokens - 1)}

    def _prompts(self, batch: int, length: int) -> Tensor:
        """The same prompts `[B, T]` for every contender."""
        if self.ids is None:
            return self._random(batch, length, batch)
        return self.ids[: batch * length].view(batch, length)

    @staticmethod
    def _random(batch: int, length: int, seed: int) -> Tensor:
        vocabulary = VOCABULARY if SOURCE.shape is None else SOURCE.shape.vocabulary
        ids = torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
        return ids.to(SOURCE.device)

    def _seconds(self, ids: Tensor, tokens: int, settings: dict[str, Any]) -> float:
        started = devices.seconds(SOURCE.device)
        output = self.model.generate(input_ids=ids, max_new_tokens=tokens, **settings)
        seconds = devices.seconds(SOURCE.device) - started
        if "return_dict_in_generate" in settings:
            self.statistics.append(output.draft_statistics)
        return seconds

    def operations(self, batch: int) -> dict[str, int]:
        """Operations that every further token costs."""
        counts = []
        ids = self._random(batch, 8, 0)
        for tokens in (2, 4):
            with Operations() as counter:
                self.model.generate(input_ids=ids, max_new_tokens=tokens, **self.settings)
            counts.append(counter.count)
        return {"operations": (counts[1] - counts[0]) // 2}

    def parameters(self) -> dict[str, int]:
        """How many parameters the contender trains, and how many there are."""
        return {
            "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "all": sum(p.numel() for p in unique(self.model)),
        }

    def drafts(self) -> dict[str, float]:
        """Share of accepted tokens, and tokens per base pass."""
        drafted, accepted, passes = (
            sum(getattr(s, n) for s in self.statistics) for n in ("drafted", "accepted", "base_passes")
        )
        return {"acceptance": accepted / max(1, drafted), "tokens_per_base_pass": (accepted + passes) / passes}


def unique(model: nn.Module) -> list[Tensor]:
    """Every parameter once."""
    return list({id(p): p for p in model.parameters()}.values())


def main(name: str, options: str) -> None:
    """Answer requests until there are no more; options are what a `Worker` takes, and where base and adapter are."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    given = json.loads(options)
    SOURCE.base, SOURCE.adapter = given.pop("base", None), given.pop("adapter", None)
    if shape := given.pop("shape", None):
        SOURCE.shape, SOURCE.device, SOURCE.dtype = SHAPES[shape], given.pop("device"), given.pop("dtype")
    worker = Worker(name, **given)
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with torch.no_grad():
            answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
