"""One contender in a process of its own: it reads requests as lines of JSON and answers each with a line.

    {"do": "time", "batch": 8, "prompt": 128, "tokens": 32}     -> {"prefill": seconds, "decode": seconds per step}
    {"do": "operations", "batch": 1}                            -> {"operations": of one decoding step, views apart}
    {"do": "statistics"}                                        -> what became of the drafts so far

Prefill is `generate` of one token; a decoding step is what every further token adds to that.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import logging

from benchmarks.decoding.contenders import CONTENDERS, VOCABULARY, draft_with_oracle

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
    """A contender and what it is asked."""

    def __init__(self, name: str, acceptance: float | None) -> None:
        self.model, self.acceptance = CONTENDERS[name](), acceptance
        self.settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        self.statistics: list[Any] = []
        self.written: dict[tuple[int, int, int], Tensor] = {}

    def time(self, batch: int, prompt: int, tokens: int) -> dict[str, float]:
        """Seconds of the prompt's pass, and of every step behind it."""
        ids = torch.randint(1, VOCABULARY, (batch, prompt), generator=torch.Generator().manual_seed(batch))
        drafting = dict(self.settings)
        if self.acceptance is not None:
            if (batch, prompt, tokens) not in self.written:
                written = self.model.generate(input_ids=ids, max_new_tokens=tokens, **self.settings)
                self.written[batch, prompt, tokens] = written
            draft_with_oracle(self.written[batch, prompt, tokens], self.acceptance, seed=len(self.statistics))
            drafting |= {"use_shadow_draft": True, "return_dict_in_generate": True}
        prefill = min(self._seconds(ids, 1, self.settings) for _ in range(2))
        whole = self._seconds(ids, tokens, drafting)
        return {"prefill": prefill, "decode": (whole - prefill) / (tokens - 1)}

    def _seconds(self, ids: Tensor, tokens: int, settings: dict[str, Any]) -> float:
        started = time.perf_counter()
        output = self.model.generate(input_ids=ids, max_new_tokens=tokens, **settings)
        seconds = time.perf_counter() - started
        if "return_dict_in_generate" in settings:
            self.statistics.append(output.draft_statistics)
        return seconds

    def operations(self, batch: int) -> dict[str, int]:
        """Operations that every further token costs."""
        counts = []
        ids = torch.randint(1, VOCABULARY, (batch, 8))
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


def main(name: str, acceptance: str | None = None) -> None:
    """Answer requests until there are no more."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    worker = Worker(name, None if acceptance is None else float(acceptance))
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with torch.no_grad():
            answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
